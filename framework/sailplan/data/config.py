"""Configuration of data sets, of how their records are read, and the rules of each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal, NamedTuple

from sailplan.config.components import join
from sailplan.config.fields import (
    Count,
    NotNegative,
    Positive,
    Share,
    ShareBelowOne,
    Size,
    Temperature,
    When,
)
from sailplan.errors import ConfigurationError

MODALITIES = ("text", "vision", "audio")
Modality = Literal["text", "vision", "audio"]
Kind = Literal["items", "pairs", "sequences"]
Part = Literal["item", "query", "target", "history"]  # of a record
Grouping = Literal["pattern", "modality"]  # of patterns that share a learned number
InterestView = Literal[
    "content_single", "content_multi", "collaboration_single", "collaboration_multi"
]
INTEREST_VIEWS: tuple[InterestView, ...] = (
    "content_single",
    "content_multi",
    "collaboration_single",
    "collaboration_multi",
)
MOST_LABELS = 64  # positive labels: bits of a number
ARTIFACT = "artifact:"  # shards of a data set that a stage makes at its start
# How many steps a loader may be ahead of training; of records that are left out it must know in time
STEPS_AHEAD = 99
# Kind of a data set -> the parts that its records have.
KINDS: dict[Kind, tuple[Part, ...]] = {
    "items": ("item",),
    "pairs": ("query", "target"),
    "sequences": ("history", "target"),
}
RATES = {
    "whisper": 16000,
    "clap": 48000,
    "clap_fusion": 48000,
}  # Hz, of front ends that published encoders were made for


def _check_name(path: str, name: str) -> None:
    """Raise ConfigurationError for a name that could be no part of a `PatternKey` or of a
    parameter's name.
    """
    wrong = next(
        (found for character, found in ((".", "a dot"), ("/", "a slash")) if character in name),
        None,
    )
    if wrong is not None:
        raise ConfigurationError(f"{path}: found {wrong} in the name, expected none; rename it")


@dataclass
class ViewConfig:
    """One way to show a record's item to the encoder: which item, which modalities, which text,
    which prompt.
    """

    of: Part = "item"  # which item(s) of the record
    modalities: list[Modality] = field(default_factory=lambda: ["text"])  # type: ignore[arg-type]
    fields: list[str] = field(
        default_factory=list
    )  # text fields, in order; used when "text" is in modalities
    # join: all fields in one text; one: one random entry of the fields (keyword sampling)
    pick: Literal["join", "one"] = "join"
    # of pictures KEY.N.jpg: the first ones, or frames spread evenly over all (in training, drawn
    # from equal parts); a film's always are
    frames: Literal["first", "spread"] = "first"
    prompt: str = ""  # task sentence put before the item's fields

    def validate(self, path: str) -> None:
        """Raise ConfigurationError for a view that would show nothing."""
        if not self.modalities:
            raise ConfigurationError(
                f"{path}.modalities is empty: expected some of text, vision, audio"
            )
        if "text" in self.modalities and not self.fields:
            raise ConfigurationError(
                f"{path}.fields is empty: a view with text needs the names of its text fields, "
                "such as title"
            )
        for name in self.fields:
            if name in ("True", "False", "None", "null", "~", ""):
                raise ConfigurationError(
                    f"{path}.fields has {name!r}, which YAML makes of true, false or null: put the "
                    "field's name in quotes"
                )

    def check_effects(self, path: str) -> None:
        """Raise ConfigurationError for settings of a modality that the view does not show."""
        for key, found, modality in (
            ("fields", self.fields, "text"),
            ("pick", self.pick == "one" and self.pick, "text"),
            ("frames", self.frames == "spread" and self.frames, "vision"),
        ):
            if found and modality not in self.modalities:
                raise ConfigurationError(
                    f"{path}.{key}={found}: has no effect in a view that shows no {modality}; "
                    f"leave it out, or add {modality} to its modalities"
                )


@dataclass
class PatternConfig:
    """A query view to be matched with a target view, and its weight in the step's loss."""

    query: str = ""
    target: str = ""
    weight: NotNegative = 1.0


class PatternKey(NamedTuple):
    """One pattern of one data set: what temperatures, thresholds and mined negatives belong to."""

    dataset: str
    pattern: str

    def __str__(self) -> str:
        """Return "DATASET/PATTERN": its name in files, metrics and reports."""
        return f"{self.dataset}/{self.pattern}"

    @classmethod
    def parse(cls, name: str) -> PatternKey:
        """Return the key that `str` gave."""
        dataset, _, pattern = name.partition("/")
        return cls(dataset, pattern)


@dataclass
class HeldOutConfig:
    """Which records are held out of training, where they do not say it themselves: a share of
    the values of a key, by their hash.
    """

    fraction: Share = 0.1
    # Key of the record's JSON, such as item or user: records with the same value lie on the same
    # side
    by: str = "id"

    def validate(self, path: str) -> None:
        """Raise ConfigurationError for a key without a name."""
        if not self.by:
            raise ConfigurationError(
                f"{path}.by is empty: expected id, or a key of the records' JSON"
            )


@dataclass
class InterestsConfig:
    """A log of timed events, from which a stage's artifact `interests` is made, and the rules of
    its views (recipe 4.2).
    """

    events: str = ""  # file or folder of .parquet or .jsonl, a row an event (or one of its labels)
    user: str = "user"  # names of columns
    item: str = "item"  # ids of the catalogue
    time: str = "time"  # numbers, timestamps, or texts such as 2026-11-29T12:00:00Z
    labels: str | None = (
        # A text or a list of texts; null: the log has none, every event is one positive behaviour
        "labels"
    )
    positive: list[str] = field(
        default_factory=list
    )  # labels that are positive behaviours, such as like, share, finish
    views: list[InterestView] = field(default_factory=lambda: list(INTEREST_VIEWS))
    single_peak_behaviours: Size = (
        3  # different positive labels of the user that an item needs in a single-peak view
    )
    multi_peak_behaviours: Size = 1  # the same in a multi-peak view
    jaccard: ShareBelowOne = 0.5  # label sets that agree have a Jaccard coefficient above this
    content_similarity: float | None = (
        None  # content_single: lowest cosine to the target; null: the nearest, however near
    )
    clusters: Literal["labels", "content"] = (
        "labels"  # collaboration_multi: what a user's items are clustered by
    )
    content_clusters: Annotated[Size, When("clusters", ("content",))] = 64  # of all items
    draw: Literal["recent", "random"] = (
        "recent"  # of items that a rule holds equal: the last ones, or a fixed random choice
    )
    max_events: Size = 1000  # of a user, the last ones

    def positive_labels(self) -> list[str]:
        """Return the names of the positive labels."""
        return ["event"] if self.labels is None else list(self.positive)

    def validate(self, path: str) -> None:
        """Raise ConfigurationError where it is not clear what is read, or what counts as
        positive.
        """
        if not self.events:
            raise ConfigurationError(
                f"{path}.events is empty: expected a file or a folder of .parquet or .jsonl"
            )
        if not self.views:
            raise ConfigurationError(
                f"{path}.views is empty: expected some of {', '.join(INTEREST_VIEWS)}"
            )
        if self.labels is None and self.positive:
            raise ConfigurationError(
                f"{path}.positive={self.positive} beside labels=null: name the column of the "
                "labels, or leave positive out"
            )
        if self.labels is not None and not 1 <= len(set(self.positive)) <= MOST_LABELS:
            raise ConfigurationError(
                f"{path}.positive={self.positive}: expected 1 to {MOST_LABELS} labels that are "
                "positive behaviours, such as like; "
                "for a log without labels set labels: null"
            )

    def check_effects(self, path: str) -> None:
        """Raise ConfigurationError for settings of views that are not made."""
        defaults = InterestsConfig()
        for key, view in (
            ("content_similarity", "content_single"),
            ("clusters", "collaboration_multi"),
            ("single_peak_behaviours", "_single"),
            ("multi_peak_behaviours", "_multi"),
        ):
            found = getattr(self, key)
            if found != getattr(defaults, key) and not any(view in name for name in self.views):
                raise ConfigurationError(
                    f"{path}.{key}={found}: has no effect on the views {', '.join(self.views)}; "
                    "leave it out, or add a view that it is for"
                )


@dataclass
class DatasetConfig:
    """A data set: where its shards are, what its records hold, and which patterns it trains."""

    # Folder or brace pattern of webdataset tars; "artifact:NAME" = made by the curriculum at a
    # stage's start
    shards: str = ""
    kind: Kind = "items"
    held_out: HeldOutConfig | None = None  # a held-out split for data that has none
    # The items data set that ids refer to; null: pairs hold their items themselves
    catalogue: Annotated[str | None, When("kind", ("pairs", "sequences"))] = None
    views: dict[str, ViewConfig] = field(default_factory=dict)
    patterns: dict[str, PatternConfig] = field(default_factory=dict)
    temperature: Temperature = 0.05  # start value of this data set's learnable temperatures
    language_weights: dict[str, Share] = field(
        default_factory=lambda: {"en": 0.5}
    )  # the rest is shared by the other languages
    field_drop: Share = 0.15  # probability that a text field is dropped in training (never all)
    history_length: Annotated[Size, When("kind", ("sequences",))] = 10  # items in a history
    # pairs/sequences: how many of a record's own `negatives` join the denominators, beside the
    # other rows' targets
    negatives: int = 0
    # pairs: key of the records' JSON that lists a teacher's score of the target and of each of the
    # record's `negatives`, for score_distillation; null: none has
    teacher_scores: Annotated[str | None, When("negatives")] = None
    # Key of the records' JSON, or text field of their items, whose value is a record's class, for
    # multi_positive; null: they have none
    label: str | None = None
    symmetric: bool = True  # InfoNCE in both directions
    # Graded pairs: only pairs above this score are positives of contrastive losses; CoSENT takes
    # all
    positive_score: Annotated[float, When("kind", ("pairs",))] = 0.0
    # Strength in training of changes to pictures (crop, flip, colour) and to sound (a turn in time,
    # gain, masked bands and times)
    image_augmentation: Share = 0.0
    # shards artifact:interests: the timed events that they are made from; null: the recorded sets
    # of the same catalogue, without time order
    interests: InterestsConfig | None = None

    def validate(self, path: str) -> None:
        """Raise ConfigurationError for views, patterns and negatives that no record of this kind
        has.
        """
        if self.interests is not None and self.shards != f"{ARTIFACT}interests":
            raise ConfigurationError(
                f"{path}.interests is set beside shards={self.shards}: expected shards: "
                f"{ARTIFACT}interests"
            )
        if self.negatives < 0 or (self.negatives and self.kind == "items"):
            raise ConfigurationError(
                f"{path}.negatives={self.negatives}: expected 0 or more for pairs and sequences, "
                "whose records list them, and 0 for items"
            )
        if self.teacher_scores is not None and self.kind != "pairs":
            raise ConfigurationError(
                f"{path}.teacher_scores={self.teacher_scores}: expected a data set of kind pairs, "
                f"found {self.kind}"
            )
        for name, view in self.views.items():
            if view.of not in KINDS[self.kind]:
                raise ConfigurationError(
                    f"{path}.views.{name}.of={view.of}: a data set of kind '{self.kind}' has "
                    f"{', '.join(KINDS[self.kind])}"
                )
        for name, pattern in self.patterns.items():
            _check_name(f"{path}.patterns.{name}", name)
            for side in (pattern.query, pattern.target):
                if side not in self.views:
                    raise ConfigurationError(
                        f"{path}.patterns.{name}: no view '{side}'; this data set has: "
                        f"{', '.join(self.views) or 'none'}"
                    )
        if self.kind == "sequences" and not self.catalogue:
            raise ConfigurationError(
                f"{path}.catalogue is missing: sequences refer to the items of another data set by "
                "id"
            )

    def check_effects(self, path: str) -> None:
        """Raise ConfigurationError for media's settings where no view shows any."""
        if self.image_augmentation and all(
            list(view.modalities) == ["text"] for view in self.views.values()
        ):
            raise ConfigurationError(
                f"{path}.image_augmentation={self.image_augmentation}: has no effect, as no view "
                "shows a picture or sound; leave it out"
            )


@dataclass
class TeacherConfig:
    """Vectors by item id that a recommender brings."""

    path: str = ""  # .npy [rows, dimension], or .parquet
    ids: str | None = (
        # .npy: a text file with the item id of each row, one a line; .parquet: the column of ids,
        # default id
        None
    )
    vector: str = "vector"  # .parquet: the column of the vectors
    dimension: int | None = None  # of the vectors; None: the file's

    def validate(self, path: str) -> None:
        """Raise ConfigurationError for a file of another kind."""
        if not self.path.endswith((".npy", ".parquet")):
            raise ConfigurationError(
                f"{path}.path={self.path}: expected a file that ends in .npy or .parquet"
            )

    def check_effects(self, path: str) -> None:
        """Raise ConfigurationError for a column of a file that has none."""
        if self.path.endswith(".npy") and self.vector != TeacherConfig.vector:
            raise ConfigurationError(
                f"{path}.vector={self.vector}: has no effect on {self.path}, which has no columns; "
                "leave it out"
            )


@dataclass
class StreamConfig:
    """How shards that lie elsewhere are fetched: byte ranges into a cache of this machine."""

    cache_bytes: Size = 64_000_000_000  # that a machine keeps; what was used longest ago goes
    folder: str | None = (
        None  # of the cache, on a disk of this machine; null: stream/ in data.cache
    )
    in_flight: Size = 32  # requests of a rank at a time
    ahead: Count = 4  # steps (of each worker) whose rows are fetched before they are asked for
    deadline_seconds: Positive = 300.0  # for a request with all its retries, then exit code 75
    timeout_seconds: Positive = 30.0  # without a byte, then another attempt


@dataclass
class DataConfig:
    """Reading: the reading order's constants and the limits on broken samples."""

    root: str = "data/quickstart"
    tokenizer: str = "${data.root}/tokenizer.json"
    lanes: Size | None = (
        None  # of version 0.1.0: accepted, of no effect; any number of ranks reads one order
    )
    segment: Size = 64  # records read in sequence by a lane
    window: Size = 512  # records shuffled together within a lane
    workers: Count = 0
    prefetch: Annotated[Size, When("workers")] = 2  # steps decoded ahead by each worker
    max_tokens: Size = 48  # prompt + text, longer texts are cut
    image_size: Size = 64
    # Pictures that keep their sides' ratio, for model.vision.backbone=siglip2: at most so many
    # patches of image_patch x image_patch pixels, in the place of a square of image_size. None:
    # squares.
    image_patches: int | None = None
    image_patch: int | None = None  # equals model.vision.patch
    frames: Size = 1
    audio_rate: Size = 16000  # Hz
    audio_chunk_seconds: Positive = 10.0
    audio_chunks: Size = 1
    mel_bins: Size = 64
    # whisper: Whisper's front end (16000 Hz; 80 or 128 mel_bins; its files know chunks of 30 s);
    # clap: CLAP's (48000 Hz; 64 mel_bins; chunks of 10 s); clap_fusion: CLAP's with fusion, a whole
    # recording as four spectrograms of 10 s
    spectrogram: Literal["own", "whisper", "clap", "clap_fusion"] = "own"
    bad_sample_limit: Share = (
        0.01  # fraction of samples that may be replaced before the run stops with exit code 65
    )
    # Steps in a row in which a pattern has no row with both sides, or no negative: the run stops
    # with exit code 65
    empty_steps: Size = 8
    cache: str | None = (
        # Folder for what is fetched from URLs, and for indices where the shards' own cannot be
        # written
        None
    )
    stream: StreamConfig = field(default_factory=StreamConfig)
    sets: dict[str, DatasetConfig] = field(default_factory=dict)
    # One learned temperature for each pattern of each data set, or for all patterns that match the
    # same modalities (text to vision, ...), whatever their data sets
    temperature_by: Grouping = "pattern"
    # What id2item distils; empty: the artifact `teachers` factorises the training histories
    # instead.
    teachers: dict[str, TeacherConfig] = field(default_factory=dict)

    def validate(self, path: str) -> None:
        """Raise ConfigurationError for a name that no parameter can have, an item corpus that is
        none, sound that its front end does not take, and loaders that are too far ahead.
        """
        if self.workers * self.prefetch > STEPS_AHEAD:
            raise ConfigurationError(
                f"{path}.workers={self.workers} x {path}.prefetch={self.prefetch}: expected at "
                f"most {STEPS_AHEAD} steps ahead, as records that are left out are from the next "
                "step on; lower prefetch"
            )
        for name in self.teachers:
            _check_name(f"{path}.teachers.{name}", name)
        for name, dataset in self.sets.items():
            _check_name(f"{path}.sets.{name}", name)
            if dataset.kind == "sequences" or dataset.catalogue:
                self._check_catalogue(join(path, f"sets.{name}.catalogue"), dataset.catalogue)
        rate = RATES.get(self.spectrogram, self.audio_rate)
        if self.audio_rate != rate:
            raise ConfigurationError(
                f"{path}.audio_rate={self.audio_rate}: expected {rate}, the rate of "
                f"{path}.spectrogram={self.spectrogram}"
            )
        if self.spectrogram == "clap_fusion" and self.audio_chunks != 1:
            raise ConfigurationError(
                f"{path}.audio_chunks={self.audio_chunks}: expected 1 with "
                f"{path}.spectrogram=clap_fusion, which shows a recording as a whole"
            )

    def _check_catalogue(self, key: str, name: str | None) -> None:
        if name not in self.sets:
            raise ConfigurationError(
                f"{key}={name}: no such data set; data.sets has: {', '.join(self.sets)}"
            )
        if self.sets[name].kind != "items":
            raise ConfigurationError(
                f"{key}={name}: is of kind '{self.sets[name].kind}', expected 'items'"
            )
