"""The one object through which a run is watched: values go in, every logger gets them.

On ranks other than 0 the list of loggers is empty, so the training loop calls the same methods
everywhere and never asks for its rank. The run folder's own files are always written, as resuming
and the report rest on them (a subclass of `RunFiles` may take their place); the other loggers are
the configuration's, and one that fails is left out from then on: training goes on.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType

from sailplan.config.fields import Options
from sailplan.config.targets import check_options, class_at
from sailplan.errors import ConfigurationError
from sailplan.observe.logger import Examples, Logger, Results, RunInfo, StageInfo, Value
from sailplan.observe.run_files import RunFiles

__all__ = ["MetricWriter", "RunInfo", "StageInfo"]


def logger_classes(
    loggers: Mapping[str, Options], allowed: Sequence[str]
) -> dict[str, type[Logger]]:
    """Return the class of each logger of the configuration.

    Raises ConfigurationError for a target that is missing or no Logger, an option that it does not
    have, and a package that is not installed: on every rank, before the run.
    """
    found = {}
    for name, options in loggers.items():
        key, target = f"loggers.{name}", options.get("_target_")
        if not isinstance(target, str) or not target:
            raise ConfigurationError(
                f"{key}._target_: found {target!r}, expected a class, such as "
                "sailplan.observe.console.ConsoleLogger"
            )
        cls = class_at(f"{key}._target_", target, Logger, allowed)
        check_options(key, cls, _options(options), ("run",))
        if cls.package is not None and importlib.util.find_spec(cls.package) is None:
            raise ConfigurationError(
                f"{key}: {cls.__name__} needs the package {cls.package}, which is not installed: "
                f"pip install {cls.package}"
            )
        found[name] = cls
    return found


def _options(given: Options) -> Options:
    return {key: value for key, value in given.items() if key != "_target_"}


def _made(cls: type[Logger], run: RunInfo, options: Options) -> Logger:
    return cls(run, **_options(options))


class MetricWriter:
    """Fan metrics out to the run folder and the configuration's loggers; do nothing on ranks
    other than 0.

    loggers: name -> `_target_` and options. Usable as a context manager, so that the terminal is
    restored on any exit.
    """

    def __init__(
        self,
        run: RunInfo,
        loggers: Mapping[str, Options],
        rank: int,
        *,
        allowed_targets: Sequence[str] = ("sailplan.",),
    ) -> None:
        self.stage: StageInfo | None = None
        self.finished = False
        self.files: Logger | None = None
        self.loggers: dict[str, Logger] = {}
        classes = logger_classes(loggers, allowed_targets)
        if rank != 0:
            return
        files = {name for name, cls in classes.items() if issubclass(cls, RunFiles)}
        if len(files) > 1:
            raise ConfigurationError(
                f"loggers: found {', '.join(sorted(files))}, expected one that writes the run "
                "folder's own files; leave one out"
            )
        own = next(iter(files), None)
        self.files = RunFiles(run) if own is None else _made(classes[own], run, loggers[own])
        for name, cls in classes.items():
            if name == own:
                continue
            try:
                self.loggers[name] = _made(cls, run, loggers[name])
            except ConfigurationError:
                raise
            except Exception as error:  # a tracking service may fail in any way
                _warn(name, error)

    def _each(self, call: Callable[[Logger], None]) -> None:
        """Call every logger; those of the configuration that fail are left out from then on."""
        if self.files is not None:
            call(self.files)
        for name, logger in list(self.loggers.items()):
            try:
                call(logger)
            except BrokenPipeError:  # the reader of our output (head, less) has gone
                raise
            except Exception as error:
                del self.loggers[name]
                _warn(name, error)

    def start_stage(self, stage: StageInfo) -> None:
        """Say that a stage begins or is continued."""
        self.stage = stage
        self._each(lambda logger: logger.start_stage(stage))

    def log_step(self, step: int, stage: str, values: Mapping[str, Value]) -> None:
        """Log values of step `step` (counted from 1): "loss/total", "accuracy",
        "rows_per_second", "data/set" ...
        """
        self._each(lambda logger: logger.log_step(step, stage, values))

    def log_alert(self, step: int, name: str, text: str) -> None:
        """Tell the loggers that something goes wrong, at or after step `step`."""
        self._each(lambda logger: logger.log_alert(step, name, text))

    def log_evaluation(
        self, step: int, stage: str, results: Results, examples: Examples | None = None
    ) -> None:
        """Log all tasks' results after step `step`; `examples` are nearest neighbours for the
        report.
        """
        self._each(lambda logger: logger.log_evaluation(step, stage, results, examples or {}))

    def finish_stage(self) -> None:
        """Say that the current stage's last step is done."""
        if self.stage is not None:
            stage = self.stage
            self._each(lambda logger: logger.finish_stage(stage))
            self.finished = stage.index == stage.count
            self.stage = None

    def close(self) -> None:
        """Flush and end all loggers; safe to call twice."""
        self._each(lambda logger: logger.close(self.finished))
        self.files, self.loggers = None, {}

    def __enter__(self) -> MetricWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _warn(name: str, error: Exception) -> None:
    reason = " ".join(str(error).split()) or type(error).__name__
    message = f"sailplan: warning: loggers.{name}: {reason}; the run goes on without it (metrics.jsonl has every step)"
    print(
        message, file=sys.stderr, flush=True
    )  # not warnings.warn: the command line silences those of all dependencies
