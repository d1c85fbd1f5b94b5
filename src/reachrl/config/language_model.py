"""Options of a policy's language model: its sizes, and low-rank adapters on it."""

from typing import Literal, Self

from pydantic import Field, model_validator

from reachrl.config.base import Section

NUM_ACTION_BINS = 256


class LanguageModelConfig(Section):
    """Sizes of the Llama language model."""

    vocab_size: int = Field(default=1088, gt=NUM_ACTION_BINS)
    """Rows of the embedding, padding rows included."""
    pad_to_multiple_of: int = Field(default=64, gt=0)
    """Rows after the vocabulary; the action tokens are the 256 rows that end where these begin."""
    hidden_size: int = Field(default=128, gt=0)
    """Width of a token."""
    intermediate_size: int = Field(default=344, gt=0)
    """Hidden units of a layer's gated MLP."""
    num_layers: int = Field(default=4, gt=0)
    """Decoder layers."""
    num_heads: int = Field(default=4, gt=0)
    """Attention heads; must divide `hidden_size`."""
    num_kv_heads: int | None = Field(default=None, gt=0)
    """Key and value heads; unset means as many as `num_heads`."""
    max_positions: int = Field(default=2048, gt=0)
    """Longest sequence."""
    rope_theta: float = Field(default=10000.0, gt=0)
    """Base of the rotary position embedding."""
    rms_norm_eps: float = Field(default=1e-6, gt=0)
    """Epsilon of the RMS normalisations."""
    bos_token_id: int = Field(default=1, ge=0)
    """Token the image patches are inserted behind."""
    pad_token_id: int = Field(default=1024, ge=0)
    """Token that fills up short prompts."""
    empty_token_id: int = Field(default=2, ge=0)
    """The lone space ("▁") that closes a prompt (29871 in Llama-2)."""

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        kv_heads = self.num_kv_heads or self.num_heads
        if self.hidden_size % self.num_heads or self.num_heads % kv_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size}, num_heads={self.num_heads} and num_kv_heads={kv_heads} must divide "
                "one another in this order"
            )
        if self.vocab_end < NUM_ACTION_BINS:
            raise ValueError("vocab_size - pad_to_multiple_of leaves no room for the 256 action tokens")
        for name in ("bos_token_id", "pad_token_id", "empty_token_id"):
            if getattr(self, name) >= self.vocab_size:
                raise ValueError(
                    f"{name}={getattr(self, name)} is no row of the embedding, vocab_size={self.vocab_size}"
                )
        return self

    def has_widths_of(self, block: int) -> bool:
        """Whether rows of the layers' weights fall into whole blocks of so many numbers."""
        return self.hidden_size % block == self.intermediate_size % block == 0

    @property
    def vocab_end(self) -> int:
        """One past the last action token (32000 for OpenVLA)."""
        return self.vocab_size - self.pad_to_multiple_of


class LoRAConfig(Section):
    """Low-rank adapters: the base stays frozen, small matrices beside its linear maps are trained (in float32).

    Source: Hu et al. 2021, LoRA, equation 3: W x + alpha / rank * B A x.
    """

    rank: int = Field(default=32, gt=0)
    """Inner size of the two matrices."""
    alpha: float = Field(default=16.0, gt=0)
    """Scale; the update is multiplied by alpha / rank (OpenVLA's recipe: min(rank, 16))."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout in front of the matrices while training by demonstrations. RL needs 0: the ratio must start at 1."""
    parts: tuple[Literal["language_model", "projector", "vision", "patches", "head"], ...] = Field(
        default=("language_model",), min_length=1
    )
    """What gets adapters: all linear maps of the decoder layers, of the projector, of the towers' blocks; and, as in
    other tools' adapters of all linear maps, the towers' embeddings of patches and the language model's head."""
    base: Literal["plain", "nf4"] = "plain"
    """How the frozen weights are held. `plain`: all in `policy.dtype`. `nf4` (QLoRA): the linear maps of the decoder
    layers in 4.13 bits a weight, decoded at each use; the rest in `policy.dtype`. Needs the extra `quantised`."""

    @model_validator(mode="after")
    def _parts_are_distinct(self) -> Self:
        if len(set(self.parts)) != len(self.parts):
            raise ValueError(f"parts={list(self.parts)} names a part twice")
        if "head" in self.parts and self.dropout:
            raise ValueError('parts holds "head", which has no dropout: rows of its weight are read. Set dropout=0')
        return self
