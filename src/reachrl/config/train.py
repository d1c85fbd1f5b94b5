"""The root of the configuration: one run from demonstrations to report."""

import math
from typing import Annotated, Self

from pydantic import Field, SerializeAsAny, model_validator

from reachrl.config.algorithm import AlgorithmSection
from reachrl.config.audit import AuditSection
from reachrl.config.backend import BackendSection, LocalBackendConfig, RayBackendConfig
from reachrl.config.base import Section
from reachrl.config.curriculum import SuccessRateConfig
from reachrl.config.demos import DemosSection, SFTSection
from reachrl.config.env import EnvSection, MetaworldConfig
from reachrl.config.evaluation import EvalSection
from reachrl.config.marks import Affects
from reachrl.config.policy import OpenVLAConfig, PrismaticConfig
from reachrl.config.ppo import PPOConfig
from reachrl.config.reward import ProcessRewardConfig
from reachrl.config.reward_model import RewardModelSection, SmallRewardModelConfig
from reachrl.config.rollout import RolloutSection
from reachrl.errors import ConfigError
from reachrl.registry import in_main

# Configuration key -> registry group of the sections that are chosen by `kind`.
KIND_SECTIONS = {
    "env": "envs",
    "policy": "policies",
    "reward": "rewards",
    "reward_model": "reward_models",
    "curriculum": "curricula",
    "algorithm": "algorithms",
    "backend": "backends",
}

SMALLEST_DISCOUNT = 1e-38  # a reward divided by less has no finite float32


class TrainConfig(Section):
    """Everything that decides the numbers of one run."""

    description: Annotated[str, Affects.SPEED] = ""
    """One line for `reachrl list`."""
    seed: Annotated[int, Field(ge=0), Affects.DATA | Affects.WARM_START | Affects.REWARD_MODEL | Affects.TRAINING] = 1
    """Seed of every stream: demonstrations, weights, shuffles, sampling, curriculum."""
    num_threads: Annotated[Annotated[int, Field(ge=1)] | None, Affects.COMPUTATION | Affects.FUTURE] = None
    """Threads of the learner process; none takes as many as there are cores for this process."""
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$"), Affects.COMPUTATION | Affects.FUTURE] = "auto"
    """Where the policy computes: `cpu`, `cuda`, `cuda:1`; `auto` takes the first GPU if there is one."""
    num_iterations: Annotated[int, Field(ge=1), Affects.TRAINING | Affects.FUTURE] = 30
    """Training iterations."""
    checkpoint_every: Annotated[int, Field(ge=1), Affects.TRAINING | Affects.FUTURE] = 5
    """Iterations between checkpoints; one is always written at the end."""
    keep_checkpoints: Annotated[int, Field(ge=1), Affects.SPEED] = 2
    """Newest checkpoints kept on disk."""
    keep_best_checkpoints: Annotated[int, Field(ge=0), Affects.SPEED] = 0
    """Checkpoints kept beside those, for their success on validation starts (`eval.during_every`): the highest. The
    weights of the best point alone are kept in `checkpoints/best` anyway."""
    explain_after: Annotated[int, Field(ge=1), Affects.SPEED] = 10
    """Iterations without success, or of a fall, after which the run says in words what its figures point to."""
    collect_ahead: Annotated[bool, Affects.TRAINING | Affects.FUTURE] = False
    """Collect the next rollout while the learner works on the last one. Its weights are then one update old, which
    `algorithm.importance_cap` must correct for; before a checkpoint they never are."""
    env: Annotated[SerializeAsAny[EnvSection], Affects.EPISODE] = MetaworldConfig()
    """The simulator and its tasks."""
    policy: Annotated[SerializeAsAny[Section], Affects.ARCHITECTURE] = OpenVLAConfig()
    """The policy's architecture, or a checkpoint to start from."""
    demos: Annotated[DemosSection, Affects.DATA] = DemosSection()
    """Expert demonstrations for the warm start."""
    sft: Annotated[SFTSection, Affects.WARM_START] = SFTSection()
    """Supervised warm start."""
    reward_model: Annotated[SerializeAsAny[RewardModelSection], Affects.REWARD_MODEL] = SmallRewardModelConfig()
    """Fitting of the process reward model."""
    reward: Annotated[SerializeAsAny[Section], Affects.TRAINING] = ProcessRewardConfig()
    """What the policy is rewarded for."""
    audit: Annotated[AuditSection, Affects.TRAINING] = AuditSection()
    """When the dense reward and true success are said to have parted."""
    curriculum: Annotated[SerializeAsAny[Section], Affects.TRAINING] = SuccessRateConfig()
    """Which task and start state the next episode gets."""
    rollout: Annotated[RolloutSection, Affects.TRAINING] = RolloutSection()
    """What is collected in an iteration."""
    algorithm: Annotated[SerializeAsAny[AlgorithmSection], Affects.TRAINING] = PPOConfig()
    """What learns from it."""
    eval: Annotated[EvalSection, Affects.EVALUATION] = EvalSection()
    """Held-out evaluation."""
    backend: Annotated[SerializeAsAny[BackendSection], Affects.SPEED] = LocalBackendConfig()
    """Where training computes."""

    @property
    def fine_tunes(self) -> bool:
        """Whether the warm start trains the policy; otherwise it keeps it as it is."""
        return self.sft.steps is not None or self.sft.epochs > 0

    @property
    def actions_executed(self) -> int:
        """Control steps of a decision: `env.execute`, or all actions that the policy's section says it answers with."""
        return self.env.execute or getattr(self.policy, "num_actions", 1)

    @property
    def longest_episode(self) -> int:
        """Decisions of an episode that ends at its time limit."""
        return math.ceil(self.env.max_steps / self.actions_executed)

    @property
    def fits_reward_model(self) -> bool:
        """Whether the reward scores frames with a model that this run fits."""
        reward = self.reward
        return isinstance(reward, ProcessRewardConfig) and reward.weight > 0 and reward.checkpoint is None

    @model_validator(mode="after")
    def _the_backend_can_do_it(self) -> Self:
        backend = self.backend
        if isinstance(backend, LocalBackendConfig) and backend.evaluator_envs:
            if backend.sharding == "full":
                raise ValueError(
                    "backend.evaluator_envs plays with a copy of the whole policy, which backend.sharding=full splits "
                    "between the learners: set backend.evaluator_envs=0"
                )
            for key in ("env", "policy"):
                if in_main(kind := str(getattr(self, key).kind)):
                    raise ValueError(
                        f"{key}.kind={kind} is a class of the notebook or script itself, which the process of "
                        "backend.evaluator_envs cannot import: put it into a file, or set backend.evaluator_envs=0"
                    )
        if not isinstance(backend, RayBackendConfig):
            return self
        if self.collect_ahead and backend.placement == "colocated":
            raise ValueError(
                "collect_ahead=true collects while the learner works, backend.placement=colocated lets one at a "
                "time have the GPU: set backend.placement=split"
            )
        for key in KIND_SECTIONS.keys() - {"reward", "curriculum"}:  # these two stay in this process
            if in_main(kind := str(getattr(self, key).kind)):
                raise ValueError(
                    f"{key}.kind={kind} is a class of the notebook or script itself, which the processes of "
                    "backend.kind=ray cannot import: put it into a file and name it from there (my_file:MyClass), "
                    "or set backend.kind=local"
                )
        if self.device.startswith("cuda:"):
            raise ValueError(
                f"device={self.device}: backend.kind=ray gives each process a GPU of its own; set device=cuda or auto"
            )
        return self

    @model_validator(mode="after")
    def _the_algorithm_gets_what_it_needs(self) -> Self:
        needs, num_envs, longest = self.algorithm.needs, self.env.num_envs, self.longest_episode
        if needs.group_size > 1 and not needs.whole_episodes:
            raise ValueError("an algorithm that needs groups needs whole_episodes too: its section must say so")
        if not needs.values and isinstance(self.policy, PrismaticConfig) and self.policy.critic != "shared":
            raise ValueError(
                f"policy.critic={self.policy.critic} would hold a critic that the algorithm never computes: set "
                "policy.critic=shared"
            )
        if needs.max_rollouts > 1 and self.collect_ahead:
            raise ValueError(
                "collect_ahead=true collects before it is known whether this iteration wants another rollout: set "
                "algorithm.max_rollouts=1"
            )
        if not needs.whole_episodes:
            return self
        if longest > self.rollout.num_steps:
            raise ValueError(
                f"this algorithm learns from whole episodes, but those of {longest} decisions "
                f"(env.max_steps={self.env.max_steps}) exceed rollout.num_steps={self.rollout.num_steps}: raise "
                "rollout.num_steps"
            )
        episodes = num_envs * (self.rollout.num_steps // longest)
        if episodes % needs.group_size:
            raise ValueError(
                f"a rollout has {episodes} whole episodes (env.num_envs={num_envs}, each as many as fit into "
                f"rollout.num_steps), which are no groups of algorithm.group_size={needs.group_size}: change one"
            )
        return self

    @model_validator(mode="after")
    def _four_bits_stay_whole(self) -> Self:
        if isinstance(self.policy, PrismaticConfig) and self.policy.four_bit and self.backend.sharding == "full":
            raise ValueError(
                "policy.lora.base=nf4 holds weights in packed bytes, backend.sharding=full would split them between "
                "the learners: each learner keeps a whole 4-bit base, so set backend.sharding=none"
            )
        return self

    @model_validator(mode="after")
    def _other_distributions_are_corrected_for(self) -> Self:
        if self.algorithm.corrects_sampler:
            return self
        remedy = "which nothing corrects for: set algorithm.importance_cap (2.0 is a common bound)"
        if self.collect_ahead:
            raise ValueError(f"collect_ahead=true trains on rollouts of weights that are one update old, {remedy}")
        if isinstance(self.policy, PrismaticConfig) and self.policy.rollout_precision != "as_trained":
            raise ValueError(
                "policy.rollout_precision=float8 draws actions from a slightly other distribution than is trained, "
                f"{remedy}"
            )
        return self

    @model_validator(mode="after")
    def _refits_are_possible(self) -> Self:
        every = self.reward_model.refit_every
        if every and not self.fits_reward_model:
            raise ValueError(
                f"reward_model.refit_every={every} refits the model that this run fits and scores with: set "
                "reward.kind=process with a weight above 0 and no reward.checkpoint, or refit_every=0"
            )
        if every and self.longest_episode > self.rollout.num_steps:
            raise ValueError(
                f"reward_model.refit_every={every} needs episodes that fit into one rollout, but those of "
                f"{self.longest_episode} decisions (env.max_steps={self.env.max_steps}) exceed rollout.num_steps="
                f"{self.rollout.num_steps}: raise rollout.num_steps"
            )
        return self

    @model_validator(mode="after")
    def _chunks_fit(self) -> Self:
        chunk = getattr(self.policy, "num_actions", 1)
        if self.env.execute is not None and self.env.execute > chunk:
            raise ValueError(
                f"env.execute={self.env.execute} actions are to be carried out of the {chunk} that this policy answers "
                f"with: lower env.execute to {chunk} at most, or leave it out"
            )
        model = self.reward_model
        if self.actions_executed > 1 and self.fits_reward_model and model.num_frames > 1:
            raise ValueError(
                f"reward_model.num_frames={model.num_frames} frames lie {model.frame_stride} control steps apart in "
                f"demonstrations, but in rollouts only every {self.actions_executed}th control step is seen "
                "(env.execute): set reward_model.num_frames=1, or env.execute=1"
            )
        return self

    @model_validator(mode="after")
    def _segments_can_be_paid(self) -> Self:
        reward, discount = self.reward, self.algorithm.discount
        by_segments = isinstance(reward, ProcessRewardConfig) and (reward.mode, reward.pay) == ("potential", "segments")
        if by_segments and discount ** (self.env.max_steps - 1) < SMALLEST_DISCOUNT:
            raise ValueError(
                f"reward.pay=segments divides the potential by algorithm.gamma={discount:g} once for each further "
                "control step of a segment, which is no longer a finite number over "
                f"env.max_steps={self.env.max_steps}: raise algorithm.gamma, or set reward.pay=steps"
            )
        return self

    @model_validator(mode="after")
    def _training_has_what_it_asks_for(self) -> Self:
        self.demos.randomise.check("demos.randomise", self.env.axes, self.env.kind)
        wanted, there = self.reward_model.rollouts_per_task, self.env.num_train_starts
        if self.fits_reward_model and wanted > there:
            raise ValueError(
                f"reward_model.rollouts_per_task={wanted} exceeds env.num_train_starts={there}: each of these episodes "
                "has a start of its own, so lower the one or raise the other"
            )
        return self

    @model_validator(mode="after")
    def _what_chooses_is_measured(self) -> Self:
        asked = {"eval.patience": self.eval.patience, "keep_best_checkpoints": self.keep_best_checkpoints or None}
        for key, value in asked.items():
            if value is not None and not self.eval.during_every:
                raise ValueError(
                    f"{key}={value} goes by success on validation starts, which eval.during_every=0 does not measure: "
                    "set it to a number of iterations"
                )
        return self

    @model_validator(mode="after")
    def _enough_held_out_starts(self) -> Self:
        wanted = {"num_starts": self.eval.num_starts}
        if self.eval.during_every:
            wanted["during_starts"] = self.eval.during_starts
        for name, count in wanted.items():
            if count > self.env.num_eval_starts:
                raise ValueError(
                    f"eval.{name}={count} exceeds env.num_eval_starts={self.env.num_eval_starts}: lower the one or "
                    "raise the other"
                )
        return self


def refuse_training(config: TrainConfig) -> None:
    """Refuse to train what cannot learn; it may be evaluated.

    Raises:
        ConfigError: weights in 16 bits, whose small steps would be rounded away; or actions of another size.
    """
    policy = config.policy
    if not isinstance(policy, PrismaticConfig):
        return
    policy.check_action_dim(config.env.action_dim, config.env.kind)
    if policy.dtype == "bfloat16" and policy.lora is None:
        raise ConfigError(
            "policy.dtype=bfloat16 without policy.lora trains weights in 16 bits: at a learning rate of 2e-5 96 % of "
            "them never move. Set policy.dtype=float32 policy.compute_dtype=bfloat16 (the same arithmetic over "
            "float32 weights), or train adapters: policy.lora.rank=32"
        )
