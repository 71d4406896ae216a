"""Meta-learning: what the techniques share that learn from tasks how to learn a new one from a few samples.

A batch is T tasks, each with a support set and a query set. A technique says what it loses on each task
(:meth:`MetaLearner.task_losses`) and what it answers after 0, 1, … n steps of adaptation
(:meth:`MetaLearner.answered`).
The meta-gradient is the mean over the tasks; tasks are computed in chunks (:mod:`lab.vectorization`), each with weights
of its own (:mod:`lab.functional`). It is found in the step itself, and given to autograd as the loss's gradient: so
DDP, clipping, schedules, accumulation and averages work as with any loss.

Tests give means over episodes with 95 % intervals (t, over episodes), and medians: a few hard tasks can carry a mean.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.optim import Adam

from lab.batch import Episodes, Labelled
from lab.distributed import gathered
from lab.few_shot import figures_of, losses_of, nearest_neighbour, summary
from lab.functional import Functional, Weights
from lab.modules import counted
from lab.modules.supervised import Supervised, Terms
from lab.objectives import Objective
from lab.objectives.classification import Classification
from lab.optimization import OptimizerFactory
from lab.ranges import Count, checked
from lab.tables import Table
from lab.vectorization import Execution, cloned

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RUNNING = (
    "batch_norm: running has no meaning here: running statistics would be a mixture of all tasks, and of weights "
    "before and after adaptation. `transductive` normalises by the samples that are asked about, `task` by the task's "
    "support set"
)


class _Given(torch.autograd.Function):
    """A loss whose gradient is known already."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: Sequence[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *torch._foreach_mul(ctx.gradients, upstream)


class MetaLearner(Supervised):
    """Learns from tasks; a subclass says how a task is learnt.

    Args:
        network: inputs ``[B, ...]`` to outputs ``[B, K]``.
        objective: what the outputs should be; the data's own where it is left out.
        optimizer: of the meta-gradient; waits for the parameters.
        batch_norm: by what batch normalisation normalises: ``transductive``, the samples that are asked about;
            ``task``, the task's support set. ``running`` is refused.
        execution: ``vmap`` computes tasks in one call, ``loop`` one by one, ``auto`` as a short measurement at the
            first step says. The numbers are the same.
        chunk_size: how many tasks in one call, at most; all of a batch where it is None.

    Raises:
        ValueError: ``batch_norm: running``; ``chunk_size`` with a loop.
    """

    consumes = Episodes
    unsharded = "tasks adapt copies of the weights, which are whole"
    unsaved: ClassVar[tuple[str, ...]] = ("_function", "_execution", "_episodes", "_examples", "_found")

    @checked
    def __init__(
        self,
        network: nn.Module,
        objective: Objective,
        optimizer: OptimizerFactory = Adam,
        *,
        batch_norm: Literal["transductive", "task", "running"] = "transductive",
        execution: Literal["auto", "vmap", "loop"] = "auto",
        chunk_size: Count | None = None,
        **supervised: Any,
    ) -> None:
        super().__init__(network=network, objective=objective, optimizer=optimizer, **supervised)
        if batch_norm == "running":
            raise ValueError(RUNNING)
        if chunk_size is not None and execution == "loop":
            raise ValueError(f"chunk_size={chunk_size} has no meaning where execution: loop takes tasks one by one")
        self.batch_norm = batch_norm
        self.test_chart = None
        self.choices: dict[str, dict[str, Any]] = {}
        """How tasks are computed in training and in evaluation, once it is decided."""
        self._function = Functional(network, batch_norm)
        self._execution = Execution(self._step, execution, chunk_size)
        self._episodes: list[tuple[Tensor, Tensor]] = []
        self._examples: list[Tensor] = []
        self._found: list[tuple[str, nn.Parameter]] = []
        self.adaptation: list[dict[str, float]] = []
        """The last test's figures after 0, 1, … n steps: mean, half its interval, median."""

    @property
    def measure(self) -> str:
        """What tasks are judged by."""
        return self.monitor[0].partition("/")[2]

    @property
    def evaluated_steps(self) -> int:
        """Steps of adaptation in evaluation, n."""
        return 0

    @abstractmethod
    def task_losses(self, parameters: Weights, batch: Episodes, *extra: Tensor) -> Tensor:
        """``[T]``: what each task loses; differentiable by the module's parameters.

        Args:
            parameters: all of the module, and its buffers, by name.
            extra: what :meth:`extras` gave.
        """

    @abstractmethod
    def answered(self, parameters: Weights, batch: Episodes) -> list[Tensor]:
        """Outputs ``[T, Q, K]`` for the queries after 0, 1, … n steps of adaptation."""

    def extras(self) -> tuple[Tensor, ...]:
        """Tensors that a step of training depends on beside weights and data."""
        return ()

    def given(self, parameters: Weights, batch: Episodes, *extra: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The sum of tasks' losses and its gradients by the trainable parameters.

        A technique whose step is no gradient of a loss says here what it is instead.
        """
        loss = self.task_losses(parameters, batch, *extra).sum()
        wanted = [parameters[name] for name in self._trainable]
        return loss.detach(), list(torch.autograd.grad(loss, wanted, materialize_grads=True, allow_unused=True))

    # A network's answers for several tasks

    def outputs(self, weights: Weights, inputs: Tensor, own: Sequence[str] = (), part: str = "forward") -> Tensor:
        """``[T, B, K]``, the network's outputs for the inputs ``[T, B, ...]`` of tasks.

        Args:
            weights: the network's parameters and buffers; those that are the tasks' ``own`` ``[T, ...]``.
            part: a method of the network.
        """
        return self._mapped(partial(self._function, part=part), weights, own, inputs)

    def queried(self, weights: Weights, batch: Episodes, own: Sequence[str] = (), part: str = "forward") -> Tensor:
        """``[T, Q, K]``, the outputs for the queries of tasks."""
        inputs = batch.support.inputs, batch.query.inputs
        return self._mapped(partial(self._function.queried, part=part), weights, own, *inputs)

    def _mapped(self, function: Any, weights: Weights, own: Sequence[str], *inputs: Tensor) -> Tensor:
        if len(inputs[0]) == 1:
            ones = {name: weights[name][0] for name in own}
            return function({**weights, **ones}, *(part[0] for part in inputs)).unsqueeze(0)  # type: ignore[no-any-return]
        axes = {name: 0 if name in own else None for name in weights}
        return vmap(function, (axes, *(0 for _ in inputs)), randomness="different")(weights, *inputs)  # type: ignore[no-any-return]

    def network_weights(self, parameters: Weights) -> Weights:
        """The network's part of the module's parameters and buffers, by its own names."""
        return {n.removeprefix("network."): p for n, p in parameters.items() if n.startswith("network.")}

    # Steps

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One batch's mean loss over the tasks, with the meta-gradient."""
        loss, gradients = self.meta_gradient(batch)
        self._watch(Terms(loss))
        given: Tensor = _Given.apply(loss, gradients, *(each for _, each in self._named if each.requires_grad))
        return given

    def meta_gradient(self, batch: Episodes) -> tuple[Tensor, list[Tensor]]:
        """Mean over a batch's tasks of the loss, and of the gradient by each trainable parameter."""
        chunk = self._chunk("train", batch)
        self._function.train(self.training)
        return self._execution.means(self._tensors(), batch, self.extras(), chunk, mode=self.training)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Adapt to each task, and add its queries to the objective's metrics."""
        self._evaluate(batch, "val", self.val_metrics)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Adapt to each task, and add its queries to the objective's metrics."""
        self._evaluate(batch, "test", self.test_metrics)

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """What ``lab predict`` writes of every query: its episode, its place, its target, the objective's columns."""
        self._fits(batch)
        with torch.inference_mode(mode=False), torch.enable_grad():
            batch = cloned(batch)
            outputs = self._answers(batch)[-1].detach()
        assert batch.query.task is not None
        tasks, queries = outputs.shape[:2]
        index = batch.query.index if batch.query.index is not None else torch.arange(queries).expand(tasks, queries)
        targets = batch.query.targets.flatten(0, 1)
        return {
            "episode": batch.query.task.repeat_interleave(queries), "index": index.reshape(-1), "target": targets,
            **self.objective.columns(outputs.flatten(0, 1)),
        }  # fmt: skip

    def on_validation_epoch_start(self) -> None:
        """Begin without episodes."""
        self._episodes.clear()
        self._found = []

    def on_test_epoch_start(self) -> None:
        """Begin without episodes."""
        self._episodes.clear()
        self._examples, self._found = [], []

    def on_test_epoch_end(self) -> None:
        """Log what the episodes say of the figures after each step, and of nearest neighbours."""
        figures = self._gathered_episodes()
        if not len(figures):
            return
        neighbours = figures.shape[1] > self.evaluated_steps + 1
        self.adaptation = [summary(column) for column in figures[:, : self.evaluated_steps + 1].T.tolist()]
        if len(self.adaptation) > 1:
            self.log(f"test/{self.measure}_before", self.adaptation[0]["mean"])
        self.log(f"test/{self.measure}_interval", self.adaptation[-1]["interval"])
        self.log(f"test/{self.measure}_median", self.adaptation[-1]["median"])
        if neighbours:
            self.log("test/nearest_neighbour", float(figures[:, -1].mean()))

    def results(self) -> dict[str, Any]:
        """How tasks were computed, and the last test's figures."""
        rounded = [{name: round(value, 6) for name, value in each.items()} for each in self.adaptation]
        return {"execution": self.choices, "adaptation": rounded}

    def tables(self) -> dict[str, Table]:
        """``adaptation``: the test's figure after 0, 1, … n steps."""
        if not self.adaptation:
            return {}
        rows = [[step, *(round(value, 6) for value in each.values())] for step, each in enumerate(self.adaptation)]
        return {"adaptation": Table(["steps", f"{self.measure}", "interval", "median"], rows)}

    def pictures(self) -> dict[str, Figure]:
        """``adaptation``: the same as a curve; of a regression of one number also ``tasks``, before and after."""
        from lab.pictures import adaptation, adapted

        drawn: dict[str, Figure] = {}
        if len(self.adaptation) > 1:
            drawn["adaptation"] = adaptation(self.adaptation, self.measure)
        if self._examples:
            drawn["tasks"] = adapted(*(part.cpu().numpy() for part in self._examples))
        return drawn

    def compile_step(self, options: dict[str, Any] | None) -> None:
        """Compile the whole step of training, gradients included, by ``torch.compile``'s options; None: no more."""
        self._execution.compile(options)

    # How tasks are computed

    @property
    def _named(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters, found once an epoch: to look through all metrics for them takes longer than a small step."""
        if not self._found:
            self._found = list(self.named_parameters())
        return self._found

    @property
    def _trainable(self) -> list[str]:
        return [name for name, parameter in self._named if parameter.requires_grad]

    def _tensors(self) -> Weights:
        """Parameters and buffers, apart from the module's own graph."""
        found: Weights = {name: parameter.detach() for name, parameter in self._named}
        for name in self._function.buffers:
            found[f"network.{name}"] = self.network.get_buffer(name)
        return found

    def on_train_epoch_start(self) -> None:
        """Look for the parameters anew: callbacks may have changed them."""
        self._found = []

    def _step(
        self, parameters: Weights, tensors: Sequence[Tensor], extra: Sequence[Tensor], total: int
    ) -> tuple[Tensor, list[Tensor]]:
        """A chunk's part of the means over ``total`` tasks."""
        trainable = set(self._trainable)
        with torch.enable_grad():
            leaves = {n: p.detach().requires_grad_() if n in trainable else p for n, p in parameters.items()}
            loss, gradients = self.given(leaves, Episodes(Labelled(*tensors[:2]), Labelled(*tensors[2:])), *extra)
        return loss / total, list(torch._foreach_div(gradients, total))

    def _chunk(self, purpose: str, batch: Episodes) -> int:
        """How many tasks at once; decided at the first batch."""
        if purpose not in self.choices:
            if purpose == "eval" and "train" in self.choices:
                return int(self.choices["train"]["chunk"])
            extra = tuple(tensor.clone() for tensor in self.extras())
            self._function.train(False)  # else each way drops other units
            choice = asdict(self._execution.decided(self._tensors(), batch, extra))
            self._function.train(self.training)
            if purpose == "train":
                choice["compiled"] = self._execution.compiles
            trainer = self._trainer
            self.choices[purpose] = trainer.strategy.broadcast(choice) if trainer is not None else choice
        return int(self.choices[purpose]["chunk"])

    # Evaluation

    def _answers(self, batch: Episodes) -> list[Tensor]:
        """Outputs for a batch's queries after 0, 1, … n steps, ``[T, Q, K]`` each."""
        chunk, parameters = self._chunk("eval", batch), self._tensors()
        self._function.train(False)
        parts = [self.answered(parameters, batch[begin : begin + chunk]) for begin in range(0, len(batch), chunk)]
        return [torch.cat(step).detach() for step in zip(*parts, strict=True)]

    def _evaluate(self, batch: Episodes, split: str, metrics: nn.Module) -> None:
        self._fits(batch)
        with torch.inference_mode(mode=False), torch.enable_grad():  # adaptation needs gradients
            batch = cloned(batch)
            outputs = self._answers(batch)
        targets = batch.query.targets
        figures = [figures_of(self.objective, each, targets) for each in outputs]
        if split == "test" and isinstance(self.objective, Classification) and batch.support.inputs.is_floating_point():
            figures.append(nearest_neighbour(batch))
        assert batch.query.task is not None
        self._episodes.append((batch.query.task, torch.stack(figures, 1)))
        if split == "test" and not self._examples and batch.query.inputs.shape[2:] == (1,) == outputs[0].shape[2:]:
            self._examples = [
                part[:4].squeeze(-1) for part in (batch.support.inputs, batch.support.targets, batch.query.inputs,
                                                  targets, torch.stack([outputs[0], outputs[1], outputs[-1]], 1))
            ] if len(outputs) > 1 else []  # fmt: skip
        metrics.update(outputs[-1].flatten(0, 1), targets.flatten(0, 1))  # type: ignore[operator]
        self.log_dict(metrics, on_step=False, on_epoch=True, batch_size=len(batch))  # type: ignore[arg-type]
        loss = losses_of(self.objective, outputs[-1], targets).mean()
        self.log(f"{split}/loss", loss, on_step=False, on_epoch=True, batch_size=counted(batch), sync_dist=True)

    def _gathered_episodes(self) -> Tensor:
        """``[E, n + 1]`` figures of all processes' episodes, in their order."""
        if not self._episodes:
            return torch.zeros(0, 1)
        numbers = gathered(torch.cat([part[0] for part in self._episodes]))
        figures = gathered(torch.cat([part[1] for part in self._episodes]).double())
        self._episodes.clear()
        return figures[numbers.argsort()].cpu()

    def _fits(self, batch: Any) -> None:
        """Whether a batch has tasks that the network can answer.

        Raises:
            TypeError: it is no batch of episodes.
        """
        if not isinstance(batch, Episodes):
            raise TypeError(
                f"{type(self).__name__.lower()} learns tasks, such as data: {{name: episodes, source: ...}} gives; "
                f"got a batch of {type(batch).__name__}"
            )
