"""A configured policy on the meta device, and traces of its passes."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import torch

from reachrl.config.algorithm import PolicyGradientSection
from reachrl.config.train import TrainConfig
from reachrl.errors import ConfigError, ReachRLError
from reachrl.plan.meta import on_meta
from reachrl.plan.passes import Pass
from reachrl.plan.trace import Tracer, rows_for
from reachrl.plan.weights import units, weights
from reachrl.policies.base import Evaluation
from reachrl.registry import resolve
from reachrl.types import Observation

_OUTLINES: dict[tuple[Any, ...], "Outline"] = {}


def algorithm_of(config: TrainConfig) -> PolicyGradientSection:
    """The algorithm's section.

    Raises:
        ConfigError: the algorithm is a plug-in, so the work of its update is unknown.
    """
    if not isinstance(config.algorithm, PolicyGradientSection):
        kind = getattr(config.algorithm, "kind", "?")
        raise ConfigError(
            f"algorithm.kind={kind!r}: only the built-in clipped policy gradients, such as `ppo`, can be planned."
        )
    return config.algorithm


def cameras(config: TrainConfig) -> tuple[str, ...]:
    """Return the names of the cameras; an environment plug-in that lists none has one."""
    return getattr(config.env, "cameras", ("camera",))


def outline_of(config: TrainConfig, *, accelerator: bool) -> "Outline":
    """Return the outline of a configuration, cached by everything that affects its passes.

    Args:
        config: the run.
        accelerator: whether acting replays recordings (CUDA graphs) if the policy has some.

    Raises:
        ConfigError: the algorithm is unknown, or the policy cannot be built or run on the meta device.
    """
    algorithm = algorithm_of(config)
    policy, trained = config.policy, (algorithm.train_vision, algorithm.needs.values)
    key = (type(policy), policy.model_dump_json(), trained, config.env.image_size, cameras(config), accelerator)
    if key not in _OUTLINES:
        _OUTLINES[key] = Outline(config, accelerator=accelerator)
    return _OUTLINES[key]


class Outline:
    """A policy on the meta device; each pass is traced when it is first accessed.

    Args:
        config: the run; the number of rows does not matter.
        accelerator: whether acting replays recordings (CUDA graphs) if the policy has some.
    """

    def __init__(self, config: TrainConfig, *, accelerator: bool) -> None:
        algorithm = algorithm_of(config)
        self._kind: str = config.policy.kind  # pyright: ignore[reportAttributeAccessIssue]
        self._frame, self._cameras, self._train_vision = config.env.image_size, cameras(config), algorithm.train_vision
        self._with_values = algorithm.needs.values
        self._tracer = Tracer(2**62)  # while the policy is built, no tensor has rows
        with self._tracing("outline"):
            cls = resolve("policies", self._kind)
            self.policy = cls.outline(config.policy, recorder=self._tracer.replayed if accelerator else None).eval()
        frozen = [] if self._train_vision else ["vision"]
        self.policy.freeze(frozen if self._with_values else [*frozen, "value"])
        self._tracer.rows = rows_for({size for each in self.policy.parameters() for size in each.shape})
        self.weights = weights(self.policy)
        self.units, self.rest = units(self.policy)

    @contextmanager
    def _tracing(self, method: str) -> Iterator[None]:
        try:
            with on_meta(self._tracer):
                yield
        except ReachRLError:
            raise
        except (RuntimeError, NotImplementedError, ValueError) as error:
            raise ConfigError(
                f"policy.kind={self._kind!r}: `{method}` does not run on PyTorch's meta device, where a plan traces it "
                f"({type(error).__name__}: {str(error).splitlines()[0]}). It must not read numbers (item(), if "
                "mask.any()) nor a file; override `outline` and `example_inputs` where the constructor or `encode` does"
            ) from error

    def _inputs(self) -> Any:
        frames = np.zeros((self._tracer.rows, self._frame, self._frame, 3), np.uint8)
        images = dict.fromkeys(self._cameras, frames)
        observation = Observation(images=images, instructions=("do the task",) * len(frames))
        return self.policy.example_inputs(observation)

    @cached_property
    def _acted(self) -> tuple[Pass, tuple[int, int], Any]:
        """One pass, what stays allocated after the first one, and a sample."""
        with self._tracing("act"):
            before = self._tracer.now
            with self._tracer.measure() as found:
                sample = self.policy.act(self._inputs(), with_values=False)
            kept = self._since(before)
            if kept[0]:  # a copy for decoding, which later passes reuse
                gc.collect()  # reference cycles
                kept = self._since(before)
                with self._tracer.measure() as found:
                    self.policy.act(self._inputs(), with_values=False)
        return found[0], kept, sample

    @property
    def acting(self) -> Pass:
        """`act`, encoding of the frames included."""
        return self._acted[0]

    def kept_for_acting(self, rows: int) -> float:
        """Return the bytes that stay allocated between decoding passes: copies of weights, buffers of recordings."""
        fixed, row = self._acted[1]
        return (fixed + row * self.policy.acting_rows(rows)) if fixed else 0

    @cached_property
    def _seen(self) -> tuple[Pass, tuple[int, int], Any]:
        with self._tracing("cache"), torch.no_grad():
            before = self._tracer.now
            with self._tracer.measure() as found:
                cached = self.policy.cache(self._inputs())
        return found[0], self._since(before), cached

    @property
    def seeing(self) -> Pass:
        """`cache`: from frames to vision features."""
        return self._seen[0]

    @property
    def features(self) -> int:
        """Bytes of cached vision features per row; 0 if the towers are trained."""
        return 0 if self._train_vision else self._seen[1][1]

    def _since(self, before: tuple[int, int]) -> tuple[int, int]:
        """Return the bytes allocated since `before`: fixed, and per row."""
        return self._tracer.now[0] - before[0], self._tracer.now[1] - before[1]

    def _trace_inputs(self) -> None:
        """Trace the inputs of scoring and training beforehand, so that they are not part of those traces."""
        _ = self._acted, self._seen

    def _given(self) -> Any:
        """Return the inputs of scoring and training: frames, or features of frozen towers."""
        return self._inputs() if self._train_vision else self._seen[2]

    def _evaluate(self, inputs: Any) -> Evaluation:
        sample = self._acted[2]
        if self._with_values:
            return self.policy.evaluate(inputs, sample.token_ids, sample.token_mask)
        return self.policy.evaluate(inputs, sample.token_ids, sample.token_mask, with_values=False)

    @cached_property
    def scoring(self) -> Pass:
        """`evaluate` without gradients; from cached features if the towers are frozen."""
        self._trace_inputs()
        with self._tracing("evaluate"), torch.no_grad(), self._tracer.measure() as found:
            self._evaluate(self._given())
        return found[0]

    @cached_property
    def valuing(self) -> Pass:
        """`values`, from cached features."""
        cached = self._seen[2]
        with self._tracing("values"), torch.no_grad(), self._tracer.measure() as found:
            self.policy.values(cached)
        return found[0]

    @cached_property
    def first_training(self) -> tuple[Pass, tuple[int, int]]:
        """`training`, with no gradients allocated beforehand."""
        return self._trained(with_gradients=False)

    @cached_property
    def training(self) -> tuple[Pass, tuple[int, int]]:
        """Forward and backward pass that accumulates into existing gradients, inputs included.

        Also returns the bytes alive between the two passes: fixed, and per row.
        """
        return self._trained(with_gradients=True)

    def _trained(self, *, with_gradients: bool) -> tuple[Pass, tuple[int, int]]:
        tracer, rows = self._tracer, torch.arange(self._tracer.rows, device="meta")
        self._trace_inputs()
        with self._tracing("evaluate"):
            parameters = [each for each in self.policy.parameters() if each.requires_grad]
            for parameter in parameters:
                parameter.grad = torch.empty_like(parameter) if with_gradients else None
            before = tracer.now
            with tracer.measure() as found:
                out = self._evaluate(self._given().rows(rows))
                loss = out.logprobs.sum() + out.entropy.sum()
                if out.values is not None:
                    loss = loss + out.values.square().sum()
                kept = self._since(before)
                # Not `loss.backward()`: while that runs, PyTorch ends the mode that stands for attention and autocast.
                run: Any = torch.autograd.graph._engine_run_backward
                ones = (torch.ones_like(loss),)
                run((loss,), ones, False, False, (), allow_unreachable=True, accumulate_grad=True)
            for parameter in parameters:
                parameter.grad = None
        return found[0], kept

    @cached_property
    def used(self) -> list[bool]:
        """Which sharding units a training pass calls."""
        called: set[int] = set()
        modules = self.policy.sharding_units()
        hooks = [each.register_forward_pre_hook(lambda module, _: called.add(id(module))) for each in modules]
        with self._tracing("evaluate"), torch.no_grad():
            self._evaluate(self._given())
        for hook in hooks:
            hook.remove()
        return [id(module) in called for module in modules]
