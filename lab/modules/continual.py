"""What techniques share that learn one task after the other: the matrix of accuracies, and what each task begins with.

R[i, j] is the metric on task j's test samples after task i was learnt, b_j the same before anything was. With T tasks,
counted from 1 (D. Lopez-Paz and M. Ranzato: Gradient Episodic Memory for Continual Learning, NeurIPS 2017,
arXiv:1706.08840; forgetting after A. Chaudhry et al.: Riemannian Walk, ECCV 2018, arXiv:1801.10112)::

    average           1/T     Σ_j      R[T, j]
    bwt               1/(T−1) Σ_{j<T}  R[T, j] − R[j, j]           backward transfer: below 0 is forgetting
    fwt               1/(T−1) Σ_{j>1}  R[j−1, j] − b_j             forward transfer
    forgetting        1/(T−1) Σ_{j<T}  max_{i<T} R[i, j] − R[T, j]
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lab.batch import Labelled, Stream, Tasks
from lab.distributed import summed
from lab.modes import evaluating
from lab.modules.supervised import Supervised, Terms
from lab.objectives import Objective
from lab.objectives.classification import Classification
from lab.ranges import Count, NonNegative, checked

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def transfer(matrix: Tensor, before: Tensor) -> dict[str, float]:
    """``average``, ``bwt``, ``fwt`` and ``forgetting`` of the equations above; what has no value is left out.

    Args:
        matrix: ``[T, T]``, R; NaN where it was not measured.
        before: ``[T]``, b.
    """
    last, tasks = matrix[-1], len(matrix)
    found = {"average": last.mean()}
    if tasks > 1:
        found["bwt"] = (last - matrix.diagonal())[:-1].mean()
        found["fwt"] = (matrix.diagonal(1) - before[1:]).mean()
        found["forgetting"] = (matrix[:-1].nan_to_num(-torch.inf).amax(0) - last)[:-1].mean()
    return {name: float(value) for name, value in found.items() if bool(value.isfinite())}


class Continual(Supervised):
    """Learns a stream of tasks; a subclass says by which means it keeps what it knows.

    At the end of each task the test samples of every task are judged, and :meth:`learnt` is called. The optimizer and
    its schedule begin anew with every task. Batch normalisation keeps the running statistics of the first task, unless
    ``batch_norm`` says otherwise: statistics that follow the newest task alone spoil the others, whatever the weights
    do. Importance of weights is always found in evaluation mode.

    Args:
        batch_norm: ``freeze`` its statistics after the first task, or let them ``adapt`` to every task.
        tasks: T. The data's.
        scenario: ``domain``, ``task`` or ``class``, see :class:`~lab.datamodules.split.Split`. The data's.
        heads: each task's outputs. The data's.

    Raises:
        ValueError: label smoothing where a task has outputs of its own: it would reward the outputs of other tasks.
    """

    consumes = Tasks
    before: Tensor
    matrix: Tensor
    own: Tensor | None
    """``[T, K]`` bool: which outputs are which task's."""

    @checked
    def __init__(
        self,
        *,
        batch_norm: Literal["freeze", "adapt"] = "freeze",
        tasks: Count = 1,
        scenario: Literal["domain", "task", "class"] = "domain",
        heads: list[list[int]] | None = None,
        **supervised: Any,
    ) -> None:
        super().__init__(**supervised)
        self.batch_norm = batch_norm
        self.tasks = tasks
        self.scenario = scenario
        if heads is not None and getattr(self.objective, "label_smoothing", False):
            raise ValueError("label smoothing has no meaning where each task has outputs of its own")
        self.register_buffer("before", torch.full((tasks,), torch.nan))
        self.register_buffer("matrix", torch.full((tasks, tasks), torch.nan))
        self.task = 0
        own = _membership(heads, tasks, self.objective) if heads is not None else None
        self.register_buffer("own", own, persistent=False)
        name = self.monitor[0].partition("/")[2]
        self._measures = nn.ModuleList(self.objective.metrics()[name] for _ in range(tasks))

    @property
    def stream(self) -> Stream:
        """The data that are learnt from."""
        return cast(Stream, self.trainer.datamodule)  # type: ignore[attr-defined]  # whatever is given to fit

    def loss(self, batch: Labelled) -> Terms:
        """The objective's, over the outputs that the scenario asks, and the penalty for what is forgotten."""
        task = self.hard(self.answers(batch), batch)
        penalty = self.penalty()
        return Terms(task) if penalty is None else Terms(task + penalty, task=task, penalty=penalty)

    def penalty(self) -> Tensor | None:
        """Scalar, added to the loss; None while there is none."""
        return None

    def learnt(self, task: int) -> None:
        """A task has been learnt."""

    def answers(self, batch: Labelled) -> Tensor:
        """The network's outputs ``[B, K]``; minus infinity where the scenario doesn't ask."""
        outputs: Tensor = self.network(batch.inputs)
        active = self.active(batch.task)
        if active is None:
            return outputs
        if outputs.ndim != 2 or outputs.shape[1] != active.shape[-1]:
            raise ValueError(
                f"the network's outputs have shape {list(outputs.shape)}, the stream needs {active.shape[-1]} outputs"
            )
        return outputs.masked_fill(~active, -torch.inf)

    def active(self, tasks: Tensor | None) -> Tensor | None:
        """``[B, K]`` or ``[K]`` bool: the outputs that count; None: all do.

        Args:
            tasks: ``[B]``, of which task each sample is.
        """
        if self.own is None:
            return None
        if self.scenario == "task" and tasks is not None:
            return self.own[tasks]
        return self.own[: self.seen].any(0)

    @property
    def seen(self) -> int:
        """How many tasks have been learnt, or are being."""
        learning = self.trainer.state.fn == TrainerFn.FITTING and not self.stream.at_once
        return self.task + 1 if learning else self.tasks

    def on_fit_start(self) -> None:
        """Refuse data that are no stream."""
        if not hasattr(self.stream, "of_tasks"):
            raise TypeError(
                f"{type(self).__name__.lower()} learns a stream of tasks, such as "
                f"data: {{name: permuted, source: ...}}; {type(self.stream).__name__} is none"
            )

    def on_train_start(self) -> None:
        """Judge what the network can before it has learnt anything."""
        self.before.copy_(self.judged())

    def on_train_epoch_start(self) -> None:
        """With a new task begin a new optimization."""
        task = self.stream.task_of(self.current_epoch)
        if task != self.task and not self.stream.at_once:
            self.task = task
            self.train()
            self.trainer.strategy.setup_optimizers(self.trainer)

    def on_train_epoch_end(self) -> None:
        """With a task's last epoch, measure and consolidate."""
        super().on_train_epoch_end()
        if not self.stream.ends_task(self.current_epoch):
            return
        if self.stream.at_once:
            self.task = self.tasks - 1
        self.matrix[self.task] = self.judged()
        self.log("stream/average", self.matrix[self.task, : self.task + 1].mean(), sync_dist=True)
        self.learnt(self.task)

    def train(self, mode: bool = True) -> Continual:
        """Training mode, but for batch normalisation that is to stay as it is."""
        super().train(mode)
        if mode and self.batch_norm == "freeze" and self.task > 0:
            for part in self.network.modules():
                if isinstance(part, _BatchNorm):
                    part.eval()
        return self

    @torch.no_grad()
    def judged(self) -> Tensor:
        """``[T]``, the metric of every task's test samples; NaN of tasks of which no output counts yet."""
        precision = self.trainer.precision_plugin
        with evaluating(self.network), precision.forward_context():
            for batch in self.on_device("test", range(self.tasks)):
                self._measure(self.answers(batch), batch)
        return self._measured()

    def on_device(
        self, split: Literal["train", "val", "test"], tasks: range, at_most: int | None = None
    ) -> Iterator[Tasks]:
        """The labelled samples of tasks, on the module's device and in its precision."""
        for batch in self.stream.of_tasks(split, tasks, at_most):
            moved = self.trainer.strategy.batch_to_device(batch, self.device)
            moved.inputs = self.trainer.precision_plugin.convert_input(moved.inputs)
            yield moved

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Add a batch to ``val/loss`` and the objective's metrics: of all tasks seen so far."""
        self._judge(batch, "val", self.val_metrics)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Add a batch to the test's metrics, and to those of its task."""
        self._judge(batch, "test", self.test_metrics)
        with torch.no_grad():
            self._measure(self.answers(batch), batch)

    def on_test_epoch_end(self) -> None:
        """The last row is what was tested; log what follows from all."""
        super().on_test_epoch_end()
        self.matrix[-1] = self._measured()
        for name, value in transfer(self.matrix, self.before).items():
            self.log(f"test/{name}", value, sync_dist=True)

    def results(self) -> dict[str, Any]:
        """The matrix R, a row a task that was learnt, and what was known before; None where nothing was measured."""

        def plain(row: Tensor) -> list[float | None]:
            return [None if math.isnan(value) else round(value, 6) for value in row.tolist()]

        return {"matrix": [plain(row) for row in self.matrix], "before": plain(self.before)}

    def pictures(self) -> dict[str, Figure]:
        """The objective's, and ``tasks``: R as a heat map."""
        from lab.pictures import heatmap

        drawn = super().pictures()
        if bool(self.matrix.isfinite().any()):
            rows = [f"after {task + 1}" for task in range(self.tasks)]
            columns = [f"{task + 1}" for task in range(self.tasks)]
            name = self.monitor[0].partition("/")[2]
            drawn["tasks"] = heatmap(self.matrix.cpu().numpy(), rows, columns, f"{name} on each task")
        return drawn

    def schedule_steps(self) -> tuple[int, int]:
        """Optimizer steps of a task, and of an epoch."""
        total, epoch = super().schedule_steps()
        return (total, epoch) if self.stream.at_once else (epoch * self.stream.epochs_per_task, epoch)

    def _measure(self, outputs: Tensor, batch: Labelled) -> None:
        assert batch.task is not None
        known = batch.labelled
        for task in set(batch.task.tolist()):
            of_task = known & (batch.task == task)
            if bool(of_task.any()):
                self._measures[task].update(outputs[of_task], batch.targets[of_task])

    def _measured(self) -> Tensor:
        updates = [float(metric.update_called) for metric in self._measures]  # type: ignore[arg-type]
        seen, _ = summed(torch.tensor(updates, device=self.device), 1)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*before the ``update`` method")  # by this process, or none
            values = torch.stack([torch.as_tensor(metric.compute()).cpu() for metric in self._measures])  # type: ignore[operator]
        values = values.to(self.matrix).masked_fill(seen.to(self.matrix) == 0, torch.nan)
        for metric in self._measures:
            metric.reset()  # type: ignore[operator]
        if self.scenario == "class" and self.own is not None:
            values[self.seen :] = torch.nan
        return values


class Anchored(Continual):
    """Holds weights near values that they had, each as firmly as it was important.

    With importances A and anchors m of all trainable parameters θ of the network, the penalty is
    ``strength`` · Σ A (θ − m)². Both are one vector each, whatever the number of tasks: a sum of quadratics is one.

    Args:
        strength: how firmly.
    """

    unsharded = "importances and anchors are of all weights in every process"
    importance: Tensor
    anchor: Tensor

    @checked
    def __init__(self, strength: NonNegative = 1.0, **continual: Any) -> None:
        super().__init__(**continual)
        self.strength = strength
        size = sum(parameter.numel() for parameter in self.trained())
        kind = next(self.trained(), torch.empty(0)).dtype
        self.register_buffer("importance", torch.zeros(size, dtype=kind))
        self.register_buffer("anchor", torch.zeros(size, dtype=kind))

    def trained(self) -> Iterator[nn.Parameter]:
        """The parameters that the penalty is on."""
        return (parameter for parameter in self.network.parameters() if parameter.requires_grad)

    def weights(self) -> Tensor:
        """All of them, ``[P]``."""
        return torch.cat([parameter.reshape(-1) for parameter in self.trained()])

    def vector(self, by_name: Mapping[str, Tensor]) -> Tensor:
        """Values by the network's parameter names as ``[P]``."""
        names = [name for name, parameter in self.network.named_parameters() if parameter.requires_grad]
        return torch.cat([by_name[name].reshape(-1) for name in names])

    def penalty(self) -> Tensor | None:
        """``strength`` · Σ A (θ − m)²; None before the second task, and without strength."""
        if not self.strength or not self.task or self.stream.at_once:
            return None
        return self.strength * (self.importance * (self.weights() - self.anchor).square()).sum()


def _membership(heads: list[list[int]], tasks: int, objective: Objective) -> Tensor:
    """``[T, K]`` bool: which outputs are which task's.

    Raises:
        ValueError: there is not one head a task, or the objective is no classification.
    """
    if len(heads) != tasks:
        raise ValueError(f"{len(heads)} heads for {tasks} tasks: one each is needed")
    if not isinstance(objective, Classification):
        raise ValueError(f"heads are those of classes: {type(objective).__name__} is no classification")
    own = torch.zeros(tasks, objective.num_classes, dtype=torch.bool)
    for task, head in enumerate(heads):
        own[task, head] = True
    return own
