"""Settings of training: the base model, the optimisation and distillation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PlainSerializer, model_validator

from pipelines.recipes.base_settings import OR_AUTO, Seed, Settings

_WINDOW_SETTINGS = ("window_fill", "window_timestamps", "window_prompt")


def _bool_if_certain(probability: float) -> bool | float:
    """Return 0 and 1 as booleans, which older recipes have: their digests stay the same."""
    return bool(probability) if probability in (0, 1) else probability


class ModelSettings(Settings):
    """The model that training starts from, and which of its weights are trained."""

    base: str = "openai/whisper-tiny"
    """A Hub id, `hub://owner/name@revision`, a folder, or a quantised model such as `openai/whisper-small@q8`."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout in encoder and decoder during training, 0 to below 1. Whisper was trained without; 0.1 is too much for
    whisper-tiny."""
    layer_drop: float = Field(0.0, ge=0, lt=1)
    """Probability that a layer of encoder or decoder is skipped in a forward pass of training, 0 to below 1 (LayerDrop,
    Fan et al. 2019, as transformers has it; CoRal trains Whisper with 0.1). 0: as the base model's config.json says."""
    spec_augment: bool = False
    """Mask time and mel bands during training (SpecAugment, Park et al. 2019)."""
    freeze_encoder: bool = False
    """Train the decoder only, with the encoder frozen and without dropout in it: less memory, no backward pass
    through the encoder."""
    adapter: Literal["", "lora"] = ""
    """`lora`: train low-rank matrices beside the frozen weights (Hu et al. 2021) and merge them at the end. With
    `freeze_encoder` only the decoder has them."""
    lora_rank: int = Field(8, ge=1)
    """lora: rank of the matrices, at least 1."""
    lora_alpha: float = Field(16.0, gt=0)
    """lora: the update is scaled by lora_alpha / lora_rank; above 0."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """lora: dropout before the matrices, 0 to below 1."""
    lora_targets: tuple[Literal["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"], ...] = Field(
        ("q_proj", "v_proj"), min_length=1
    )
    """lora: the layers with such matrices: four of the attention, two of the feed-forward network."""

    load_in_8bit: bool = False
    """lora: keep the frozen linear layers in 8 bits on an NVIDIA GPU (LLM.int8, Dettmers et al. 2022): a quarter of
    their memory. It needs the package bitsandbytes. The matrices are merged into the full weights at the end."""

    @model_validator(mode="after")
    def _8_bit_weights_need_an_adapter(self) -> ModelSettings:
        if self.load_in_8bit and not self.adapter:
            raise ValueError("model.load_in_8bit is set, so model.adapter must be 'lora': 8-bit weights stay frozen")
        return self

    @model_validator(mode="after")
    def _lora_settings_need_an_adapter(self) -> ModelSettings:
        fields = {name: field for name, field in type(self).model_fields.items() if name.startswith("lora_")}
        changed = [name for name, field in fields.items() if getattr(self, name) != field.default]
        if changed and not self.adapter:
            raise ValueError(f"model.{changed[0]} is set, so model.adapter must be 'lora'")
        return self


class DistillationSettings(Settings):
    """Training of a smaller student with a tuned teacher; see training/distillation.py. No teacher: plain tuning."""

    teacher: str = ""
    """The model that teaches the student and initialises it: a model's URI, or `run:<recipe>`, the model trained with
    that recipe's [model], [augment] and [training] on this recipe's data and `model.base`."""
    decoder_layers: int = Field(0, ge=0)
    """Number of the student's decoder layers, evenly spaced in the teacher; 0 keeps all."""
    encoder_layers: int = Field(0, ge=0)
    """Number of the student's encoder layers; 0 keeps all. With all of them and `model.freeze_encoder`, teacher and
    student share one encoder, which is computed once."""
    temperature: float = Field(2.0, gt=0)
    """Temperature of both distributions in the Kullback-Leibler divergence; above 0."""
    kl_weight: float = Field(1.0, ge=0)
    """Weight of the Kullback-Leibler divergence from the teacher; the cross entropy has weight 1."""
    labels: Literal["teacher", "transcript"] = "teacher"
    """Targets of the cross entropy: the teacher's hypotheses (pseudo-labels), or the transcripts."""
    max_label_wer: float = Field(0.5, ge=0)
    """Leave out training clips if the word error rate of the teacher's hypothesis is higher; 0 keeps all."""

    @model_validator(mode="after")
    def _other_settings_need_a_teacher(self) -> DistillationSettings:
        changed = [name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default]
        if changed and not self.teacher:
            raise ValueError(
                f"distillation.{changed[0]} is set, so distillation.teacher must name a model or run:<recipe>"
            )
        return self


class TrainingSettings(Settings):
    """Batches, optimisation, validation and checkpoints."""

    steps: Annotated[int, Field(ge=1), *OR_AUTO] = 120
    """Number of optimizer steps, at least 1, or `auto`: derived from the number of clips (features/derived.py)."""
    batch_size: int = Field(8, ge=1)
    """Clips per batch, at least 1; all are padded to one length."""
    micro_batch: Annotated[int, Field(ge=0), *OR_AUTO] = 0
    """Clips per forward pass; 0: the whole batch; `auto`: as many as fit by the estimate of `doctor --recipe`. They are
    halved on out-of-memory errors. It changes the weights only by rounding and by other random draws of dropout."""
    checkpoint_activations: bool = False
    """Keep only the input of each layer, and compute the rest again in the backward pass (Chen et al. 2016): far less
    memory for about a third more time. It does not change the weights."""
    accumulation: int = Field(1, ge=1)
    """Batches per optimizer step (gradient accumulation), at least 1."""
    learning_rate: float = Field(1e-4, gt=0)
    """Highest learning rate, above 0."""
    warmup_steps: Annotated[int, Field(ge=0), *OR_AUTO] = 10
    """Steps in which the learning rate rises from 0 to its highest value; `auto`: a tenth of the steps."""
    scheduler: Literal["linear", "cosine", "constant"] = "linear"
    """Learning rate after the warm-up: falls to 0 linearly, falls to 0 as half a cosine, or stays constant."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """Layer-wise decay of the learning rate, above 0 to 1 (Clark et al. 2020, ELECTRA, took 0.8): in encoder and in
    decoder, the last layer has the whole rate, each layer below it this share of the rate of the one above, and the
    embeddings and convolutions that of a layer below the first. 1: one rate for all weights."""
    optimizer: Literal["adamw", "adamw8bit", "muon", "adafactor", "sgd"] = "adamw"
    """Optimizer. `adamw8bit` stores AdamW's two numbers per weight in 8 bits each (Dettmers et al. 2021; needs
    bitsandbytes and a GPU of NVIDIA). `muon` orthogonalises the steps of the layers' matrices (Jordan et al. 2024) at
    AdamW's learning rates (Liu et al. 2025), and all other weights have AdamW. `adafactor` (Shazeer and Stern 2018)
    stores two vectors per matrix instead of AdamW's two numbers per weight, and scales its steps by the size of the
    weights. `sgd` stores one number per weight and needs far larger learning rates."""
    weight_decay: float = Field(0.0, ge=0)
    """Weight decay of matrices; biases and layer norms have none."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """adamw: decay rate of the mean of gradients; sgd: momentum; adafactor: not used. 0 to below 1. muon's matrices
    have a momentum of 0.95."""
    beta2: float = Field(0.999, ge=0, lt=1)
    """adamw: decay rate of the mean of squared gradients, 0 to below 1; Whisper itself was trained with 0.98."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are clipped to this norm, above 0."""
    ema_decay: float = Field(0.0, ge=0, lt=1)
    """Validate and save an exponential moving average of the weights (Polyak and Juditsky 1992) with this decay, as
    0.99: about the last 1 / (1 - decay) steps. 0 to below 1; 0: no average. It takes 4 bytes of memory per trained
    weight. See training/callbacks/ema.py."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of each target's probability that is spread over the whole vocabulary, 0 to below 1 (Szegedy et al. 2016;
    0.1 is usual). The losses that are logged stay plain cross entropies."""
    bpe_dropout: float = Field(0.0, ge=0, lt=1)
    """Probability that a merge of the tokenizer is left out, 0 to below 1, drawn again for each clip and epoch: rarer
    and shorter tokens are trained, too (BPE-dropout, Provilkov et al. 2020; KB-Whisper was trained with 0.2). Training
    clips only."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the forward and backward pass; weights and optimizer are in float32. `auto`: bfloat16 on a GPU that
    has it, float16 on other GPUs of NVIDIA, float32 on a CPU. `bfloat16` on a CPU needs one with avx512_bf16 or AMX."""
    context: Literal["clip", "full"] = "clip"
    """Length of the encoder's input: `clip`: the longest clip of the batch; `full`: always 30 s."""
    bucket_batches: int = Field(20, ge=1)
    """Number of batches that are sorted by length together, then cut and shuffled; 1: batches of random lengths."""
    eval_every: Annotated[int, Field(ge=1), *OR_AUTO] = 40
    """Steps between two validations, each followed by a checkpoint; `auto`: ten validations or more."""
    keep_checkpoints: int = Field(2, ge=1)
    """Number of newest checkpoints to keep, at least 1; the best on validation is kept too."""
    remove_checkpoints: bool = True
    """Remove the checkpoints when the model is finished. False keeps them for `merge --last`: each takes four times the
    size of the trained weights."""
    patience: Annotated[int, Field(ge=0), *OR_AUTO] = 0
    """Stop after this number of validations without a better WER; 0: never stop early; `auto`: a third of them."""
    window_share: float = Field(0.0, ge=0, le=1)
    """Share of the training clips that are joined to windows of 30 s, drawn again in every epoch, 0 to 1: for models
    that transcribe long recordings, and short ones in other tools. 0: no windows, the other `window_` settings have no
    effect. See training/data/packing.py."""
    window_fill: Literal["full", "random"] = "full"
    """Clips in a window: `full`: as many as fit into 30 s; `random`: a random number from 1 to as many as fit."""
    window_timestamps: Annotated[
        float, Field(ge=0, le=1), PlainSerializer(_bool_if_certain, return_type=bool | float)
    ] = 0.0
    """Probability of timestamps in the labels of a window (start and end of each clip), 0 to 1; true is 1."""
    window_prompt: float = Field(0.0, ge=0, le=1)
    """Probability that the text of the window before is a window's prompt (`<|startofprev|>`), 0 to 1. The loss does
    not include the prompt."""
    max_hours: float = Field(0.0, ge=0)
    """Stop with a checkpoint after this number of hours; the next call resumes from it. 0: no limit."""
    fast_dev_run: bool = False
    """Train two steps and evaluate a few clips, in separate folders, to test the set-up. Scores mean nothing."""
    tracker: Literal["", "trackio", "tensorboard", "wandb", "mlflow"] = ""
    """Experiment tracker for losses and scores; each needs its package. trackio and tensorboard write to this machine
    only."""
    workers: int = Field(0, ge=0)
    """Number of processes that load batches; 0: the training process loads them."""
    seed: Seed = 42
    """Seed of batches, dropout and adapters."""

    @model_validator(mode="before")
    @classmethod
    def _share_of_0_switches_windows_off(cls, values: Any) -> Any:
        """Leave out the other settings of windows: so `window_share=0` overrides a recipe that has windows."""
        if isinstance(values, dict) and values.get("window_share") in (0, "0"):
            return {name: value for name, value in values.items() if name not in _WINDOW_SETTINGS}
        return values

    @model_validator(mode="after")
    def _window_settings_need_windows(self) -> TrainingSettings:
        for name in _WINDOW_SETTINGS:
            if getattr(self, name) != type(self).model_fields[name].default and not self.window_share:
                raise ValueError(f"training.{name} is set, so training.window_share must be above 0")
        return self
