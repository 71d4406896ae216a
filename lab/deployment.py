"""Networks as files that run elsewhere: safetensors, ONNX, torch.export; checked beside the network, and timed.

What a quantized network looks like in ONNX: :mod:`lab.integers`.
"""

from __future__ import annotations

import copy
import importlib.util
import io
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lab.errors import UserError
from lab.files import replacing
from lab.integers import OPSET, in_integers
from lab.modes import evaluating

Format = Literal["safetensors", "onnx", "torch_export"]
SUFFIXES: Mapping[Format, str] = {"safetensors": ".safetensors", "onnx": ".onnx", "torch_export": ".pt2"}
BATCH = "batch"
"""The name of the first dimension, of any size."""
RUNTIMES: Mapping[Format, str] = {"onnx": "onnxruntime", "torch_export": "torch"}
EXACT, ROUNDED = 1e-3, 0.1
"""How far a file's outputs may be from the network's, as a part of the largest: of one that is quantized, any number
between two steps may become either."""
Runner = Callable[[Tensor], Tensor]


class Difference:
    """How far a file's outputs are from the network's, over batches."""

    def __init__(self) -> None:
        self.largest = self.reach = 0.0
        self.same = self.count = 0

    def add(self, expected: Tensor, made: Tensor) -> None:
        """One batch: outputs ``[B, ...]`` of both."""
        self.largest = max(self.largest, float((made - expected).abs().max()))
        self.reach = max(self.reach, float(expected.abs().max()))
        if expected.ndim > 1:
            self.same += int((expected.argmax(1) == made.argmax(1)).flatten().sum())
            self.count += expected.argmax(1).numel()

    def refuse(self, path: Path, tolerance: float) -> None:
        """Remove a file that differs.

        Raises:
            UserError: it does.
        """
        if not self.share <= tolerance:
            path.unlink()
            raise UserError(
                f"{path.name} differs from the network by {self.share:.3g} of the largest output, more than "
                f"{tolerance:g}, and decides {self.agreement:.1%} alike: it is not kept"
            )

    @property
    def share(self) -> float:
        """The largest difference, as a part of the largest output."""
        return self.largest / self.reach if self.reach else self.largest

    @property
    def agreement(self) -> float:
        """The share of equal decisions: the index of the largest output."""
        return self.same / self.count if self.count else 1.0


def require(form: Format) -> None:
    """See that a format's packages are installed.

    Raises:
        UserError: one is not; says how to get it.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if form == "onnx" and missing:
        raise UserError(f"ONNX needs {', '.join(missing)}: pip install 'lightning-lab[export]'")


def export(
    network: nn.Module, example: Tensor | None, path: Path, form: Format, facts: Mapping[str, str] | None = None
) -> int:
    """Write a network, as it is in evaluation mode.

    Args:
        example: ``[1, ...]``, one input; safetensors need none.
        facts: what the file says about itself, if it can.

    Returns:
        The size of the file in bytes.

    Raises:
        UserError: its packages are missing, or the network has what the format cannot say; nothing is written.
    """
    require(form)
    with replacing(path) as temporary, evaluating(network), torch.no_grad(), torch.random.fork_rng(devices=()):
        if form == "safetensors":
            _safetensors(network, temporary, facts or {})
        else:
            assert example is not None
            _graph(network, example, temporary, form, facts or {})
    return path.stat().st_size


def tolerance(network: nn.Module, asked: float | None = None) -> float:
    """How far a file's outputs may be from a network's, as a part of the largest, unless a user says."""
    return asked if asked is not None else ROUNDED if getattr(network, "quantization", None) else EXACT


def load(path: Path) -> Runner:
    """What runs a file: inputs ``[B, ...]`` in, outputs out; both are CPU tensors of their own.

    Raises:
        UserError: it is no ONNX or torch.export file, or is damaged.
    """
    try:
        if path.suffix == ".onnx":
            require("onnx")
            return _session(path)
        if path.suffix == ".pt2":
            program = torch.export.load(path).module()

            def run(inputs: Tensor) -> Tensor:
                with torch.no_grad():
                    made: Tensor = program(inputs)
                    return made

            return run
    except UserError:
        raise
    except Exception as cause:  # whatever a damaged file leads to
        raise UserError(f"{path} cannot be run: {_first_line(cause)}") from cause
    raise UserError(f"{path} is no .onnx or .pt2 file")


def compare(network: nn.Module, run: Runner, batches: Iterable[Tensor]) -> Difference:
    """How far a file is from a network on the same inputs."""
    found = Difference()
    with evaluating(network), torch.no_grad():
        for inputs in batches:
            before = inputs.clone()
            made = run(inputs)
            if not torch.equal(before, inputs):
                raise UserError("the exported network changes its input")
            found.add(network(inputs), made)
    return found


def times(runners: Mapping[str, Runner], batch: Tensor, *, seconds: float = 1.0, least: int = 10) -> dict[str, float]:
    """The median time of each, in milliseconds; they take turns, so what else the machine does meets all alike.

    Args:
        batch: ``[B, ...]``.
        seconds: that each runs at least, unless one call takes longer.
        least: calls of each.
    """
    for run in runners.values():
        run(batch)
        run(batch)
    taken: dict[str, list[float]] = {name: [] for name in runners}
    began = time.perf_counter()
    while time.perf_counter() - began < seconds * len(runners) or min(map(len, taken.values())) < least:
        for name, run in runners.items():
            run(batch)  # what the others left in the caches is not its own
            start = time.perf_counter()
            run(batch)
            taken[name].append(time.perf_counter() - start)
    return {name: round(statistics.median(values) * 1e3, 4) for name, values in taken.items()}


def integers_are_fast() -> bool:
    """Whether this CPU multiplies 8-bit integers in one instruction (VNNI, or its like on ARM)."""
    import platform

    if platform.machine().lower() in ("arm64", "aarch64"):
        return True
    with suppress(OSError):
        return "vnni" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    return False


def _safetensors(network: nn.Module, path: Path, facts: Mapping[str, str]) -> None:
    state = {name: tensor.detach().clone().contiguous() for name, tensor in network.state_dict().items()}
    save_file(state, str(path), {"format": "pt", **facts})


def _graph(network: nn.Module, example: Tensor, path: Path, form: Format, facts: Mapping[str, str]) -> None:
    copied = copy.deepcopy(network).cpu().requires_grad_(False)
    example = example.cpu()
    if form == "onnx":
        in_integers(copied)
    pair = torch.cat([example, example])  # a dimension of one is taken for a constant
    shapes = ({0: torch.export.Dim(BATCH)},)
    try:
        with _quietly():
            if form == "torch_export":
                content = io.BytesIO()
                torch.export.save(
                    torch.export.export(copied, (pair,), dynamic_shapes=shapes), content, extra_files={**facts}
                )
                path.write_bytes(content.getvalue())
                return
            program = torch.onnx.export(
                copied, (pair,), dynamo=True, dynamic_shapes=shapes, opset_version=OPSET, verbose=False,
                input_names=["input"], output_names=["output"], external_data=False,
                optimize=not getattr(copied, "quantization", None),  # ONNX Runtime fails where equal zeros are one
            )  # fmt: skip
            assert program is not None
            for node in program.model.graph.all_nodes():
                node.metadata_props.clear()  # where in which file each came from: half of a small network's file
            program.model.metadata_props.update(facts)
            program.save(str(path), external_data=False)
    except Exception as cause:  # whatever the exporters may raise
        layer = _culprit(copied, pair)
        where = f", because of {layer}" if layer else ""
        said = f"{type(network).__name__} cannot be exported to {form}{where}"
        raise UserError(f"{said}: {_first_line(cause)}") from cause


def _culprit(network: nn.Module, example: Tensor) -> str:
    """The innermost part of a network that cannot be exported by itself, by name and class; "": none is known."""
    given: dict[str, tuple[Any, Any]] = {}

    def noted(name: str) -> Callable[..., None]:
        return lambda part, args, kwargs: given.update({name: (args, kwargs)})

    handles = [
        part.register_forward_pre_hook(noted(name), with_kwargs=True) for name, part in network.named_modules() if name
    ]
    try:
        network(example)
    finally:
        for handle in handles:
            handle.remove()
    for name in sorted(given, key=lambda name: -name.count(".")):
        part, (args, kwargs) = network.get_submodule(name), given[name]
        try:
            with _quietly():
                torch.export.export(part, args, kwargs)
        except Exception:  # whatever the exporter may raise
            return f"{name} ({type(part).__name__})"
    return ""


def _first_line(cause: Exception) -> str:
    innermost: BaseException = cause
    while innermost.__cause__ is not None:
        innermost = innermost.__cause__
    return f"{type(innermost).__name__}: {str(innermost).strip().splitlines()[0] if str(innermost).strip() else ''}"


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the exporters' talk about themselves."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _session(path: Path) -> Runner:
    import onnx
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    settings.intra_op_num_threads = torch.get_num_threads()
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not integers_are_fast() and _saturates(onnx.load(str(path))):
        settings.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    (name,) = (given.name for given in session.get_inputs())

    def run(inputs: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: inputs.contiguous().numpy()})[0])

    return run


def _saturates(model: Any) -> bool:
    """Whether a CPU without VNNI is wrong: it sums two products of bytes in 16 bits, too few for weights of 8 bits."""
    import numpy
    from onnx import numpy_helper

    found = (numpy_helper.to_array(tensor) for tensor in model.graph.initializer)
    return any(bool((numpy.abs(array.astype(numpy.int16)) > 63).any()) for array in found if array.dtype == numpy.int8)
