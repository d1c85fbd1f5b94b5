"""Options of the policy: sizes of the Prismatic architecture, prompt, critic and where weights come from."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from reachrl.config.base import Section
from reachrl.config.language_model import LanguageModelConfig, LoRAConfig
from reachrl.config.marks import Affects, affecting
from reachrl.config.towers import TINY_TOWER, TowerConfig, ViTTowerConfig
from reachrl.errors import ConfigError

NF4_BLOCK = 64  # weights that share a scale in 4 bits
# What computes the policy, not which policy it is: a training that goes on may take another.
_ENGINE = Affects.WARM_START | Affects.TRAINING | Affects.FUTURE
_FLOAT8_CAPABILITY = (8, 9)  # CUDA's compute capability of the first GPUs that multiply 8-bit numbers


def recorded_rows(batch: int) -> int:
    """Rows that decoding steps are recorded for: a power of two up to 16, then a multiple of 16."""
    return -(-batch // 16) * 16 if batch > 16 else 1 << (batch - 1).bit_length()


def check_float8(gpu: str, capability: tuple[int, int]) -> None:
    """Make sure that a GPU multiplies 8-bit numbers.

    Raises:
        ConfigError: it has no such tensor cores.
    """
    if capability < _FLOAT8_CAPABILITY:
        raise ConfigError(
            f"policy.rollout_precision=float8 needs a GPU of compute capability 8.9 or later (Ada, Hopper), {gpu} has "
            f"{capability[0]}.{capability[1]}; set policy.rollout_precision=as_trained"
        )


class PrismaticConfig(Section):
    """Vision towers, projector, Llama, 256-way action head. The defaults are the `tiny` size."""

    kind: Annotated[str, Affects.ARCHITECTURE]
    """Which policy class to build."""
    image_size: Annotated[int, Affects.ARCHITECTURE] = Field(default=96, gt=0)
    """Side of the square image the towers see, in pixels; other frames are resized (bicubic)."""
    towers: Annotated[tuple[TowerConfig, ...], Affects.ARCHITECTURE] = Field(
        default=(TINY_TOWER, TINY_TOWER), min_length=1, max_length=2
    )
    """The vision towers; their outputs are concatenated patch by patch."""
    image_mean: Annotated[tuple[tuple[float, float, float], ...], Affects.ARCHITECTURE] = (
        (0.484375, 0.455078125, 0.40625),
        (0.5, 0.5, 0.5),
    )
    """Mean of the RGB channels (0..1) each tower subtracts. The bf16-rounded numbers are those of the release."""
    image_std: Annotated[tuple[tuple[float, float, float], ...], Affects.ARCHITECTURE] = (
        (0.228515625, 0.2236328125, 0.224609375),
        (0.5, 0.5, 0.5),
    )
    """Standard deviation of the RGB channels (0..1) each tower divides by."""
    resize: Annotated[Literal["resize-naive", "letterbox"], Affects.WARM_START] = "resize-naive"
    """How a frame that is not square becomes square: stretched, or padded with borders of the mean colour."""
    rlds_frames: Annotated[bool, Affects.WARM_START] = False
    """First give frames what OpenVLA's training data went through: JPEG, and a Lanczos resize to `image_size`."""
    center_crop: Annotated[bool, Affects.WARM_START] = False
    """Then cut out the middle 90 % of the area: for checkpoints that were fine-tuned with random crops."""
    projector_expansion: Annotated[int, Affects.ARCHITECTURE] = Field(default=2, gt=0)
    """Hidden units of the two-tower projector per input channel (4 in the release)."""
    language_model: Annotated[LanguageModelConfig, Affects.ARCHITECTURE] = LanguageModelConfig()
    """The trunk."""
    tokenizer: Annotated[Literal["built_in", "folder"], Affects.WARM_START] = "built_in"
    """Words of robot instructions, built here; or `tokenizer.json` beside the weights."""
    prompt_length: Annotated[int, _ENGINE] = Field(default=16, gt=0)
    """Tokens prompts are padded to, so that shapes stay fixed; a longer prompt lengthens its batch."""
    num_action_tokens: Annotated[int, Affects.ARCHITECTURE] = Field(default=4, gt=0)
    """Tokens per action = action dimensions (4 on Meta-World, 7 on LIBERO)."""
    critic: Annotated[Literal["shared", "separate", "adapter"], Affects.ARCHITECTURE] = "shared"
    """`shared`: the value head reads the actor's trunk; `separate`: its own copy of projector and trunk; `adapter`: a
    second set of adapters on the actor's frozen base (needs `lora`): a critic of its own at nearly no memory."""
    value_hidden_size: Annotated[int, Affects.ARCHITECTURE] = Field(default=128, gt=0)
    """Hidden units of the value head."""
    value_gradient_to_trunk: Annotated[bool, _ENGINE] = True
    """Whether the value loss may change a shared trunk; `false` detaches the hidden state first."""
    lora: Annotated[LoRAConfig | None, Affects.ARCHITECTURE] = None
    """Train adapters on the frozen weights of `checkpoint`; unset trains the weights themselves."""
    gradient_checkpointing: Annotated[bool, _ENGINE] = False
    """Compute each decoder layer again in the backward pass instead of keeping it: less memory, a third more time."""
    rollout_copy: Annotated[bool, _ENGINE] = False
    """Decode with a copy of projector and trunk, adapters folded in and projections fused: faster, for the memory of
    a second trunk."""
    rollout_precision: Annotated[Literal["as_trained", "float8"], _ENGINE] = "as_trained"
    """Arithmetic of the copy's decoder layers. `float8` halves their memory and, on GPUs with 8-bit tensor cores (Ada,
    Hopper or later), speeds them up; actions are then drawn from a slightly other distribution, which `engine_kl`
    measures and `algorithm.importance_cap`, which is then required, corrects for."""
    compile_prefill: Annotated[bool, _ENGINE] = False
    """Compile the copy's decoder layers for prompts (`torch.compile`): elementwise work is merged into fewer kernels.
    Takes up to a minute when it begins and when another shape comes; on a CPU it hardly pays."""
    dtype: Annotated[Literal["float32", "bfloat16"], Affects.WARM_START] = "float32"
    """How towers, projector and trunk are stored; adapters and the value head are always float32."""
    compute_dtype: Annotated[Literal["float32", "bfloat16"] | None, _ENGINE] = None
    """Arithmetic of towers, projector and trunk; unset means `dtype`. `bfloat16` over `dtype="float32"` computes
    cheaply and keeps float32 master weights."""
    checkpoint: Annotated[Path | None, Affects.WARM_START] = None
    """Folder with weights to start from: one written by ReachRL, or the official OpenVLA layout."""
    dataset: Annotated[str | None, Affects.WARM_START] = None
    """Which action statistics of an official checkpoint to use, when it holds several."""

    @model_validator(mode="after")
    def _towers_agree(self) -> Self:
        grids = {tower.grid(self.image_size) for tower in self.towers}
        if len(grids) != 1:
            raise ValueError(f"the towers' patch grids differ: {sorted(grids)} patches a side at {self.image_size} px")
        if self.critic == "adapter" and self.lora is None:
            raise ValueError('critic="adapter" is a second set of adapters: set policy.lora.rank, or another critic')
        if self.critic == "separate" and self.lora is not None:
            raise ValueError(
                'critic="separate" copies what adapters leave frozen: use critic="adapter" with policy.lora'
            )
        if self.lora is not None and self.checkpoint is None:
            raise ValueError("policy.lora trains adapters beside frozen weights: policy.checkpoint must say which")
        llm = self.language_model
        if self.four_bit and not llm.has_widths_of(NF4_BLOCK):
            # bitsandbytes 0.50 decodes other widths wrongly on some CPUs, without a word.
            raise ValueError(
                f"lora.base=nf4 quantises rows of weights in blocks of {NF4_BLOCK}, but language_model.hidden_size="
                f"{llm.hidden_size} and intermediate_size={llm.intermediate_size}: expected multiples of {NF4_BLOCK}. "
                "Set lora.base=plain"
            )
        if self.dtype == "bfloat16" and self.compute_dtype == "float32":
            raise ValueError('compute_dtype="float32" over dtype="bfloat16" would gain nothing; leave it unset')
        if not len(self.image_mean) == len(self.image_std) == len(self.towers):
            raise ValueError(f"image_mean and image_std need one RGB triple for each of the {len(self.towers)} towers")
        if any(number <= 0 for triple in self.image_std for number in triple):
            raise ValueError(f"image_std is {self.image_std}: pixels are divided by it, expected numbers above 0")
        return self

    @model_validator(mode="after")
    def _the_copy_can_do_it(self) -> Self:
        if self.rollout_precision == "float8" and not (self.rollout_copy and self.arithmetic == "bfloat16"):
            raise ValueError(
                'rollout_precision="float8" is of the copy for decoding, and its sums are bfloat16: set '
                'policy.rollout_copy=true and policy.dtype (or compute_dtype) "bfloat16"'
            )
        llm = self.language_model
        if self.rollout_precision == "float8" and not llm.has_widths_of(16):
            raise ValueError(
                f'rollout_precision="float8" needs widths that are multiples of 16; language_model.hidden_size is '
                f"{llm.hidden_size}, intermediate_size {llm.intermediate_size}"
            )
        if self.compile_prefill and not self.rollout_copy:
            raise ValueError("compile_prefill=true compiles the copy for decoding: set policy.rollout_copy=true")
        return self

    def architecture(self) -> dict[str, Any]:
        """The keys that decide which weights fit."""
        architecture = affecting(self, Affects.ARCHITECTURE)
        llm = architecture["language_model"]
        if llm["num_kv_heads"] == llm["num_heads"]:  # the same as None
            llm["num_kv_heads"] = None
        return architecture

    @property
    def arithmetic(self) -> Literal["float32", "bfloat16"]:
        """Of towers, projector and trunk."""
        return self.compute_dtype or self.dtype

    @property
    def four_bit(self) -> bool:
        """Whether the linear maps of the decoder layers are held in 4 bits."""
        return self.lora is not None and self.lora.base == "nf4"

    @property
    def all_tokens(self) -> bool:
        """Whether an action token is chosen from the whole vocabulary, not from the 256 action tokens."""
        return False

    def check_action_dim(self, size: int | None, kind: str) -> None:
        """Check that an action has as many tokens as the environment's actions have numbers.

        Args:
            size: those numbers; None: they are not known yet.
            kind: `env.kind`.

        Raises:
            ConfigError: it has others. What a checkpoint will bring is not known here.
        """
        if self.checkpoint is None and size not in (None, self.num_action_tokens):
            raise ConfigError(
                f"policy.num_action_tokens={self.num_action_tokens}, but actions of env.kind={kind} have {size} "
                f"numbers, and each takes one token: set policy.num_action_tokens={size}"
            )

    @property
    def num_actions(self) -> int:
        """Actions of an answer."""
        return 1

    @property
    def records_steps(self) -> bool:
        """Whether single-token decoding steps are recorded on a GPU."""
        return False

    @property
    def num_patches(self) -> int:
        """Image tokens in the sequence."""
        return self.towers[0].grid(self.image_size) ** 2

    @property
    def vision_width(self) -> int:
        """Channels of one patch after concatenating the towers."""
        return sum(tower.output_width for tower in self.towers)

    @classmethod
    def openvla_7b(cls, **changes: object) -> Self:
        """The released 7B model: DINOv2-L/14 with registers, SigLIP-so400m/14 and Llama-2-7B."""
        dino = ViTTowerConfig(
            width=1024, depth=24, num_heads=16, mlp_width=4096, num_registers=4, class_token=True, layer_scale=True
        )
        siglip = ViTTowerConfig(width=1152, depth=27, num_heads=16, mlp_width=4304)
        llama = LanguageModelConfig(
            vocab_size=32064,
            hidden_size=4096,
            intermediate_size=11008,
            num_layers=32,
            num_heads=32,
            pad_token_id=32000,
            empty_token_id=29871,
        )
        sizes: dict[str, object] = {
            "image_size": 224,
            "towers": (dino, siglip),
            "projector_expansion": 4,
            "language_model": llama,
            "tokenizer": "folder",
            "prompt_length": 32,
            "num_action_tokens": 7,
            "value_hidden_size": 1024,
            "dtype": "bfloat16",
        }
        return cls.model_validate({**sizes, **changes})


class OpenVLAConfig(PrismaticConfig):
    """OpenVLA: one camera, one action an answer, its tokens decoded one after the other."""

    kind: Literal["openvla"] = "openvla"  # pyright: ignore[reportIncompatibleVariableOverride]
    vocabulary: Annotated[Literal["actions", "full"], Affects.WARM_START] = "actions"
    """What a token is chosen from: the 256 action tokens, so that every answer is an action; or all tokens, as the
    released `generate` does, for comparison. Then a token that stands for no action decodes to the nearest bin."""
    decode_graphs: Annotated[bool, _ENGINE] = True
    """On a GPU, with `rollout_copy`: record the single-token steps of each batch size once, as a CUDA graph, and replay
    them in one launch."""

    @property
    def all_tokens(self) -> bool:
        """Whether an action token is chosen from the whole vocabulary, not from the 256 action tokens."""
        return self.vocabulary == "full"

    @property
    def records_steps(self) -> bool:
        """Whether decoding steps are recorded on a GPU; not where what they read is made anew: cast, or adapted."""
        adapted_head = self.lora is not None and "head" in self.lora.parts
        return self.rollout_copy and self.decode_graphs and self.arithmetic == self.dtype and not adapted_head
