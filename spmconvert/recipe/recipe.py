"""What a conversion does, as one validated object: the recipe file, the options and the Python API all end up here.

A recipe is TOML with the tables below; every key has a default, an unknown key is an error. Options on the command line
and ``--set a.b=c`` replace single values of it. The machine's side (device, output, resume, force) is not part of a
recipe: the same recipe must give the same bytes anywhere. This module does not import torch.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from spmconvert.errors import OptionError
from spmconvert.operator.geometry import Variant
from spmconvert.operator.terms.registry import KINDS
from spmconvert.units import parse_size

# what names a dataset of the hub in the place of a text file: datasets:ID[:CONFIGURATION[:SPLIT]]
DATASET_PREFIX = "datasets:"
# text that can be had on every machine, in the place of a file
AUTO_TEXT = "auto"
# kinds that a budget tries where the recipe names none; stages lose to Monarch at equal parameters wherever both were
# measured (docs/results.md), and their fits take longest
DEFAULT_STRUCTURES = ("monarch", "sparse24", "lowrank")
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def _share(value: float) -> float:
    if not 0 < value < 1:
        raise ValueError("is not a share; give one between 0 and 1, such as 0.25")
    return value


def _file(value: Any) -> Any:
    if isinstance(value, str) and not value.strip():
        raise ValueError("is empty; name a file, or none")
    return value


# of something that is neither kept nor left out as a whole
Share = Annotated[float, AfterValidator(_share)]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class LayerDesign(_Table):
    """How one replaced layer is built.

    Attributes:
        stages: number of stages; None means one pass over all strides, ceil(log2(width / block)).
        variant: ``general`` or ``rotation``.
        block: coordinates per block.
        rank: rank of the low-rank term.
        terms: what the layer is a sum of, in the place of these numbers: tables with a ``kind`` and its own numbers,
            such as ``{kind = "sparse24"}``.
    """

    stages: Annotated[int, Field(ge=0)] | None = None
    variant: Variant = "general"
    block: Annotated[int, Field(ge=1)] = 1
    rank: Annotated[int, Field(ge=0)] = 0
    terms: Annotated[tuple[dict[str, Any], ...], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _describes_a_layer(self) -> "LayerDesign":
        _check_design(self)
        return self


class Override(_Table):
    """Another design for the layers that a pattern matches; keys that are left out keep the recipe's value.

    Terms take the place of all numbers that the recipe gives these layers, and numbers that of its terms.

    Attributes:
        pattern: preset, glob or ``re:`` pattern of the layers.
        stages: as in ``design``.
        variant: as in ``design``.
        block: as in ``design``.
        rank: as in ``design``.
        terms: as in ``design``.
    """

    pattern: str
    stages: Annotated[int, Field(ge=0)] | None = None
    variant: Variant | None = None
    block: Annotated[int, Field(ge=1)] | None = None
    rank: Annotated[int, Field(ge=0)] | None = None
    terms: Annotated[tuple[dict[str, Any], ...], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _describes_a_layer(self) -> "Override":
        _check_design(self)
        return self

    def changed(self, design: LayerDesign) -> LayerDesign:
        """The design of a layer that the pattern matches.

        Raises:
            ValidationError: when what it keeps and what it changes describe no layer together.
        """
        changes = self.model_dump(exclude={"pattern"}, exclude_none=True)
        if not changes:
            return design
        keeps = self.terms is None and design.terms is None
        return LayerDesign.model_validate({**design.model_dump(), **changes} if keeps else changes)


def _check_design(table: LayerDesign | Override) -> None:
    if table.terms is not None:
        defaults = {name: (None, LayerDesign.model_fields[name].default) for name in ("block", "rank", "stages", "variant")}
        given = [name for name, values in defaults.items() if getattr(table, name) not in values]
        if given:
            raise ValueError(f"terms and {', '.join(given)} are both given; name one or the other")
        for term in table.terms:
            if not isinstance(term.get("kind"), str) or term["kind"] not in KINDS:
                raise ValueError(f"a term has kind {term.get('kind')!r}; choose among {', '.join(KINDS)}")
    if table.variant == "rotation" and table.block not in (None, 1):
        raise ValueError(f"variant rotation needs block 1, found block {table.block}")


class Calibration(_Table):
    """The text whose activations weight the fit.

    Attributes:
        file: text (.txt, one document a line; .jsonl or .parquet with a ``text`` key; ``datasets:ID``); ``auto`` for what
            a causal model writes itself, for others prose that every Python installation has, and for models that read no
            text none; None fits in the Frobenius norm.
        rows: number of documents, or of packed blocks for causal models, that are used.
        tokens: longest row, in tokens.
        batch_size: rows per forward pass.
        held_out: share of the rows that is never fitted, only used to measure errors; under a budget as many more are
            drawn to choose designs on.
    """

    file: Annotated[Path | None, BeforeValidator(_file)] = None
    rows: Annotated[int, Field(ge=2)] = 256
    tokens: Annotated[int, Field(ge=2)] = 128
    batch_size: Annotated[int, Field(ge=1)] = 16
    held_out: Share = 0.125

    @property
    def is_dataset(self) -> bool:
        """Whether the text is a dataset and not a file."""
        return str(self.file).startswith(DATASET_PREFIX)


class Fit(_Table):
    """How layers are fitted.

    Attributes:
        iterations: most solver iterations a layer gets, Adam and L-BFGS together.
        output_weighting: weigh output directions by what their errors cost the model; needs calibration rows. None does
            so where a share or a size is kept and these costs are measured anyway.
        sequential: fit every layer on what the model converted so far feeds it, towards the dense model's outputs; needs
            calibration rows. None does so where a share or a size is kept, by more than low rank alone, and the targets
            are on one path through one list of blocks.
        refine: passes over calibration rows in which a block's new layers, norms and biases are trained to do together
            what the dense block did; 0 for none. None does so where there are rows and the targets are on one path
            through one list of blocks.
        new_bias: give every layer a bias that makes its mean output exact, where the dense layer has none, too; needs
            calibration rows. Dense exports and other runtimes have no place for such a bias.
    """

    iterations: Annotated[int, Field(ge=0)] = 200
    output_weighting: bool | None = None
    sequential: bool | None = None
    refine: Annotated[int, Field(ge=0)] | None = None
    new_bias: bool = False

    @property
    def follows_blocks(self) -> bool:
        """Whether settled fits need the calibration rows in front of every block."""
        return bool(self.sequential or self.refine)

    @property
    def fit_note(self) -> str:
        """What settled fits go for beside each layer's own error, in words; empty for nothing."""
        aims = ["weigh outputs by what their errors cost the model"] if self.output_weighting else []
        aims += ["make up for the layers converted before"] if self.sequential else []
        aims += ["match blocks as a whole"] if self.refine else []
        return f"fits {' and '.join(aims)}, which these errors do not show" if aims else ""


def _known_kind(kind: str) -> str:
    if kind not in KINDS:
        raise ValueError(f"is no kind of term; choose among {', '.join(KINDS)}")
    return kind


def _bytes(value: Any) -> Any:
    try:
        return parse_size(value) if isinstance(value, str) else value
    except OptionError:
        raise ValueError("is no size; write one such as 40MB, 1.5GB or 300000") from None


# limits that may stand beside a speed-up
SIZES = ("keep", "keep_bytes", "keep_flops")


class Budget(_Table):
    """How much of the targeted layers may be left; the designs of all layers are chosen together.

    One limit, or a speed-up beside one of the shares and sizes.

    Attributes:
        keep: share of the targeted layers' parameters.
        keep_bytes: bytes of the targeted layers in the output; text may have a unit.
        keep_flops: share of the targeted layers' floating-point operations a token.
        max_error: largest relative error of a layer on the rows that choose; the smallest design within it is taken.
        speedup: how many times faster the whole model's forward pass has to be, on the device of the conversion.
        tokens: tokens of a row of that pass; designs that are slower than the dense layer at it are no candidates.
        rows: rows of that pass.
        allow_slower: let designs be slower than the dense layer, for those who only want size.
        sensitivity: what errors of a layer cost: by the ``gradient`` of the model's outputs and, for words and classes,
            its divergence when only that layer is replaced; by that divergence alone (``kl``); or ``none``, which takes
            relative errors of all layers alike.
        structures: kinds of terms that layers may be built of; where ``lowrank`` is among them, every other kind is tried
            alone and beside it.
        iterations: most solver iterations of each candidate that is measured.
    """

    keep: Share | None = None
    keep_bytes: Annotated[int, BeforeValidator(_bytes), Field(gt=0)] | None = None
    keep_flops: Share | None = None
    max_error: Share | None = None
    speedup: Annotated[float, Field(gt=1)] | None = None
    tokens: Annotated[int, Field(ge=1)] = 512
    rows: Annotated[int, Field(ge=1)] = 1
    allow_slower: bool = False
    sensitivity: Literal["gradient", "kl", "none"] = "gradient"
    structures: Annotated[tuple[Annotated[str, AfterValidator(_known_kind)], ...], Field(min_length=1)] = DEFAULT_STRUCTURES
    iterations: Annotated[int, Field(ge=1)] = 100

    @property
    def limits(self) -> dict[str, float]:
        """The limits that are given; none for designs that the recipe names itself."""
        names = ("speedup", *SIZES, "max_error")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    @property
    def unit(self) -> str:
        """What the limit counts."""
        if self.speedup is not None:
            return "nanoseconds"
        if self.keep_flops is not None:
            return "FLOPs a token"
        return "parameters" if self.keep_bytes is None else "bytes"

    @property
    def option(self) -> str:
        """The limits as the command line takes them."""
        return " ".join(f"--{name.replace('_', '-')} {value:.15g}" for name, value in self.limits.items())

    @property
    def without_speedup(self) -> "Budget | None":
        """The limit of size beside a speed-up; None where there are not both."""
        return self.model_copy(update={"speedup": None}) if self.speedup is not None and len(self.limits) > 1 else None

    @property
    def shown_unit(self) -> str:
        """What amounts are shown in."""
        return "ms in the targeted layers" if self.speedup is not None else self.unit

    @property
    def batch_tokens(self) -> int:
        """Tokens that go through a layer at once in the pass that is timed."""
        return self.rows * self.tokens

    @property
    def loss_name(self) -> str:
        """What is made least."""
        return "sum of the layers' errors" if self.sensitivity == "none" else "predicted loss"

    @model_validator(mode="after")
    def _limits_go_together(self) -> "Budget":
        sizes = [name for name in self.limits if name in SIZES]
        if len(self.limits) > 1 and not (self.speedup is not None and len(self.limits) == 2 and sizes):
            raise ValueError(
                f"{' and '.join(self.limits)} are given at once; a conversion has one limit, or speedup beside one of "
                f"{', '.join(SIZES)}"
            )
        return self


# of a finetune of which nobody says how long it is, and of one that is told by the clock alone
STEPS, MINUTES, MOST_STEPS = 1000, 15.0, 1_000_000
# between two of its measurements
MEASURED_ROWS = 800


class Training(_Table):
    """How a converted model is distilled against its source.

    Attributes:
        steps: optimizer steps of the end-to-end stage, at most; None for as many as ``minutes`` allow.
        minutes: time that they and their measurements may take; None for as long as ``steps`` take. Without both there
            are 1000 steps (4000 of 4 rows), or as many of them as 15 minutes allow.
        layerwise: steps by which every converted layer is first matched to its dense original, one after the other.
        guided: share of ``steps`` in which the dense layers' outputs are mixed in, by a factor that falls to zero.
        train: ``spm`` layers only, with all ``norms`` and biases, or ``all``; None for all of an encoder that is not too
            large for it, and the SPM layers of everything else.
        learning_rate: of the SPM layers, at its peak; None for one that follows from what was kept.
        other_learning_rate: of everything else that is trained.
        weight_decay: of dense matrices that are trained; SPM layers, norms and biases have none.
        batch_size: rows a step, over all processes; None for 16, and for 4 where one process trains a language model on
            a CPU.
        accumulation: parts that a step's rows are cut into, one forward and backward pass each.
        block_size: longest row, in tokens.
        warm_up: share of the steps in which the learning rate rises; after it follows a cosine to zero.
        clip: largest norm of the gradient.
        temperature: that both distributions are taken at.
        cross_entropy: weight of the cross-entropy with the text's own tokens.
        hidden_states: weight of matching all hidden states.
        layer_outputs: weight of matching the outputs of the converted layers.
        pooled_states: weight of matching a row's mean hidden state, for encoders without a head.
        ema: decay of an average of the trained parameters that is measured and kept in their place; 0 for none.
        precision: of the products; parameters stay in float32. ``auto`` is bf16 where the device multiplies it natively.
        gradient_checkpointing: compute activations again in the backward pass.
        compile: compile the student by torch.compile.
        held_out: share of the documents that only measure.
        evaluation_rows: most held-out rows a measurement uses.
        evaluate_every: steps between measurements; None for as many as 800 rows take.
        save_every: steps between checkpoints.
        seed: seed of the split, of the order of rows and of masks.
        column: name of the text in .jsonl, .parquet and datasets.
    """

    steps: Annotated[int, Field(ge=1)] | None = None
    minutes: Annotated[float, Field(gt=0)] | None = None
    layerwise: Annotated[int, Field(ge=0)] = 0
    guided: Annotated[float, Field(ge=0, le=1)] = 0.0
    train: Literal["spm", "norms", "all"] | None = None
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    other_learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    batch_size: Annotated[int, Field(ge=1)] | None = None
    accumulation: Annotated[int, Field(ge=1)] = 1
    block_size: Annotated[int, Field(ge=2)] = 128
    warm_up: Annotated[float, Field(ge=0, le=1)] = 0.05
    clip: Annotated[float, Field(gt=0)] = 1.0
    temperature: Annotated[float, Field(gt=0)] = 1.0
    cross_entropy: Annotated[float, Field(ge=0)] = 0.0
    hidden_states: Annotated[float, Field(ge=0)] = 0.0
    layer_outputs: Annotated[float, Field(ge=0)] = 0.0
    pooled_states: Annotated[float, Field(ge=0)] = 0.0
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    gradient_checkpointing: bool = False
    compile: bool = False
    held_out: Share = 0.05
    evaluation_rows: Annotated[int, Field(ge=1)] = 128
    evaluate_every: Annotated[int, Field(ge=1)] | None = None
    save_every: Annotated[int, Field(ge=1)] = 100
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    column: str = "text"

    @property
    def most_steps(self) -> int:
        """Steps that a run has at most."""
        if self.steps is not None:
            return self.steps
        return STEPS if self.minutes is None else MOST_STEPS

    @property
    def most_minutes(self) -> float | None:
        """Time that it takes at most, None for no limit."""
        return MINUTES if self.minutes is None and self.steps is None else self.minutes

    @property
    def rows_of_step(self) -> int:
        """The rows of a step, once they are settled."""
        assert self.batch_size is not None
        return self.batch_size

    @property
    def measured_every(self) -> int:
        """Steps between measurements, once the rows of a step are settled."""
        return self.evaluate_every or max(1, MEASURED_ROWS // self.rows_of_step)

    @property
    def peak_rate(self) -> float:
        """The learning rate, once it is settled."""
        assert self.learning_rate is not None
        return self.learning_rate

    @model_validator(mode="after")
    def _guided_steps_are_named(self) -> "Training":
        if self.guided and self.steps is None:
            raise ValueError(f"guided {self.guided:g} is a share of the steps, and none are named; give steps, too")
        return self

    @model_validator(mode="after")
    def _parts_have_rows(self) -> "Training":
        if self.batch_size is not None and self.accumulation > self.batch_size:
            raise ValueError(f"accumulation {self.accumulation} is above batch_size {self.batch_size}; a part needs a row")
        return self


class Recipe(_Table):
    """One complete run: the conversion, and in the table ``finetune`` the distillation after it.

    Attributes:
        targets: presets mlp, attn and all, globs and ``re:`` patterns of the layers to replace, any of them in one tower
            (``text:mlp``).
        ignore: presets and patterns to leave alone.
        layers: only these blocks, for example ``4-10,-1``.
        seed: seed of starts and calibration rows.
        dtype: of the new layers; ``auto`` keeps the source's.
        allow_growth: convert layers that would become larger, too.
        design: how every layer is built.
        overrides: other designs for some layers, tables with a ``pattern`` and keys of ``design``; later ones win.
        calibration: what weights the fit.
        fit: how layers are fitted.
        budget: what chooses the design of every layer in the place of ``design``.
        finetune: the distillation.
    """

    targets: tuple[str, ...] = ("mlp",)
    ignore: tuple[str, ...] = ()
    layers: str | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    dtype: Dtype = "auto"
    allow_growth: bool = False
    design: LayerDesign = LayerDesign()
    overrides: tuple[Override, ...] = ()
    calibration: Calibration = Calibration()
    fit: Fit = Fit()
    budget: Budget = Budget()
    finetune: Training = Training()

    @property
    def names_designs(self) -> bool:
        """Whether it says what layers become, by a design or by a budget."""
        return self.design != LayerDesign() or bool(self.overrides) or bool(self.budget.limits)

    @property
    def predicts_loss(self) -> bool:
        """Whether a budget is spent by the measured cost of output errors."""
        return bool(self.budget.limits) and self.budget.sensitivity == "gradient"

    @property
    def weights_fits(self) -> bool:
        """Whether fits are weighted by the measured cost of output errors."""
        if self.fit.output_weighting is not None:
            return self.fit.output_weighting
        # a largest error is one of all output directions alike
        return self.predicts_loss and self.budget.max_error is None

    @property
    def prefers_sequence(self) -> bool:
        """Whether layers are fitted one after the other where the model allows it and nothing is said about it.

        A largest error is one of each layer on the dense model's activations, so it wants each fitted on these. Low rank
        alone is worse in sequence (see ``spmconvert.fit.sequential``).
        """
        budget = self.budget
        wanted = bool(budget.limits) and budget.max_error is None and set(budget.structures) != {"lowrank"}
        return wanted and self.calibration.file is not None

    @property
    def prefers_refinement(self) -> bool:
        """Whether blocks are refined where the model allows it and nothing is said about it; for ``max_error`` as above."""
        return self.calibration.file is not None and self.budget.max_error is None

    @model_validator(mode="after")
    def _designs_are_named_or_chosen(self) -> "Recipe":
        if self.budget.limits and (self.design != LayerDesign() or self.overrides):
            limit = " and ".join(self.budget.limits)
            raise ValueError(
                f"{limit} chooses the design of every layer; leave stages, variant, block, rank, terms and overrides out"
            )
        if not self.budget.limits and self.budget != Budget():
            given = ", ".join(f"budget.{key}" for key, value in self.budget if value != getattr(Budget(), key))
            raise ValueError(f"{given} is given without a budget to spend; add --keep, or another limit")
        if self.budget.max_error is not None and self.fit.follows_blocks:
            raise ValueError(
                "max_error limits what each layer does alone, which fits in sequence and refinement do not go for; choose "
                "one"
            )
        wanting = [name for name in ("output_weighting", "sequential", "refine") if getattr(self.fit, name)]
        if self.calibration.file is None and wanting:
            raise ValueError(f"fit.{wanting[0]} needs calibration rows; give --calib FILE")
        return self
