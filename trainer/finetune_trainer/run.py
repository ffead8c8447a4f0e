"""One run from recipe to result, in verbs: check, fetch, set up, train, score, publish.

The cheap checks come first, so that a wrong bucket or a wrong column is told in seconds, before a model is loaded.
"""

import io
import shutil
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_api import Recipe, names
from finetune_api.finetunejob import CheckpointStatus, Evaluation, MetricValue, Result
from finetune_api.model_source import Pooling
from finetune_api.report import MAX_REFUSED, EndReport, Outcome, ProgressReport, ResultFile
from finetune_api.tasks import Task
from finetune_trainer import adapters, model, model_files, token_cache
from finetune_trainer.checkpoint import Checkpoint, Checkpoints
from finetune_trainer.config import Runtime
from finetune_trainer.dist import ALONE, Group
from finetune_trainer.errors import TrainingFailure
from finetune_trainer.lineage import Lineage, same_but_length
from finetune_trainer.progress import Poster
from finetune_trainer.report import Console, trainer_status
from finetune_trainer.splits import Splits, read_splits
from finetune_trainer.store import LONG_PATIENCE, Missing, Store, open_store, sweep
from finetune_trainer.tasks import Encoded, kind_of
from finetune_trainer.trackers import Trackers, Training, open_trackers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from finetune_trainer.loop import Loop
    from finetune_trainer.sharding import Weights
    from finetune_trainer.tasks import Evaluated


@dataclass
class Run:
    """Everything that one process does, and what it knows so far for its reports."""

    recipe: Recipe
    runtime: Runtime
    stopping: threading.Event
    console: Console = field(default_factory=Console)
    checkpoints: Checkpoints | None = None
    checkpoint: CheckpointStatus | None = None
    resumed_from: CheckpointStatus | None = None
    started: datetime = field(default_factory=lambda: datetime.now(UTC))

    _extends: bool = False
    """Whether the output holds a result of this recipe with another length."""

    def __post_init__(self) -> None:
        self.kind = kind_of(self.recipe.task, self.recipe.dataset)

    @property
    def facts(self) -> dict[str, Any]:
        """What every report says of this run's checkpoints, whether it goes on or how it ended."""
        seen = self.checkpoints
        cost = {"saving": seen.saving, "corrupt": seen.refused[:MAX_REFUSED]} if seen else {}
        return {"checkpoint": self.checkpoint, "resumed_from": self.resumed_from, **cost}

    def __call__(self) -> EndReport:
        """Trains, or finds that it is done already. Raises TrainingFailure."""
        self.output = open_store(self.recipe.output.storage_uri, self.runtime.s3_root, patience=LONG_PATIENCE)
        self.output.check(writable=True)
        self.group = Group.join(self.recipe.hyperparameters.strategy)
        if not self.group.leads:
            self._follow()
        done = self._already_done() if self.group.leads else None
        if self.group.tell(done is not None):
            return done or EndReport(outcome=Outcome.ALREADY_COMPLETED)
        self._check_base()
        splits, self.counts = read_splits(self.recipe, self.runtime, self.console.line)
        self._may_go_on()
        poster = Poster(self.runtime, self.console.line)
        try:
            return self._train(splits, poster)
        finally:
            poster.close()

    def _follow(self) -> None:
        """One of several processes, and not the one that speaks: its files are its own, its lines nobody's."""
        own = self.runtime.workdir / f"rank-{self.group.rank}"
        self.runtime = replace(self.runtime, workdir=own, progress_url=None)
        self.console = Console(io.StringIO())

    # ------------------------------------------------------------------------------------------------------- check -----
    def _already_done(self) -> EndReport | None:
        try:
            result = ResultFile.model_validate_json(self.output.get(names.RESULT_FILE))
        except Missing:
            return None
        except ValueError as error:
            if self.recipe.output.overwrite:
                return None
            raise TrainingFailure("OutputExists", f"{self._result_uri()} is not a result of this trainer; {_OTHER}") from error
        if result.recipe_digest == self.recipe.digest():
            self.console.line(f"{self._result_uri()} is the result of this recipe already: nothing to train")
            return EndReport(outcome=Outcome.ALREADY_COMPLETED, result=result.result, evaluations=thin(result.evaluations))
        if self.recipe.output.overwrite:
            return None
        if self._same_but_length(result):
            self._extends = True  # its checkpoints say whether they can be gone on from
            return None
        raise TrainingFailure("OutputExists", f"{self._result_uri()} is the result of another recipe; {_OTHER}")

    def _same_but_length(self, result: ResultFile) -> bool:
        try:
            return same_but_length(Recipe.model_validate(result.recipe), self.recipe)
        except ValueError:  # of a version that had other fields
            return False

    def _check_base(self) -> None:
        """Adapters alone need the model that they were trained beside: it must not be the one that they replace."""
        lora, base = self.recipe.model.lora, f"{self.recipe.model.uri.rstrip('/')}/"
        if lora is not None and not lora.merge and base.startswith(f"{self.output.uri}/{names.MODEL_DIR}/"):
            raise TrainingFailure(
                "RecipeInvalid",
                f"model.uri: {self.recipe.model.uri} would be replaced by the adapters, which need it: change output.storageUri",
            )

    def _result_uri(self) -> str:
        return f"{self.output.uri}/{names.RESULT_FILE}"

    def _may_go_on(self) -> None:
        if self.stopping.is_set():
            raise TrainingFailure("Interrupted", "asked to end before the first step")

    # ------------------------------------------------------------------------------------------------------- train -----
    def _train(self, splits: Splits, poster: Poster) -> EndReport:
        import torch

        from finetune_trainer import vocabulary

        recipe, scratch = self.recipe, self.runtime.workdir
        if recipe.hyperparameters.deterministic:
            model.make_deterministic()
        self.checkpoints = checkpoints = Checkpoints(
            open_store(recipe.checkpoint_uri, self.runtime.s3_root, patience=LONG_PATIENCE),
            scratch / "checkpoints",
            Lineage.of(recipe, len(splits["train"])),
            keep_last=recipe.checkpoint.keep_last,
            overwrite=recipe.output.overwrite,
            log=self.console.line,
        )
        checkpoints.stopping = self.stopping
        checkpoints.seconds_to_end = SAVING_SHARE * recipe.checkpoint.save_deadline_seconds
        checkpoints.store.check(writable=True)
        restored = self._restore(checkpoints)
        if self._extends and restored is None:
            message = f"{self._result_uri()} is the result of this recipe with another length, and its checkpoints are not there; {_OTHER}"
            raise TrainingFailure("OutputExists", message)
        saved = restored[1] / "model" if restored else None
        self.source = (
            saved if saved and not recipe.model.partly_saved else model.fetch(recipe.model.uri, self.runtime, self.console.line)
        )
        tokenizer = model.load_tokenizer(saved or self.source, recipe)
        encoded = token_cache.encode(splits, self.kind, tokenizer, scratch / "tokens", self.console.line)
        self._tell_truncation(encoded)
        torch.manual_seed(recipe.hyperparameters.seed)
        learner = model.build(self.source, recipe, self.kind, tokenizer, saved)
        if not self.group.leads:
            torch.manual_seed(recipe.hyperparameters.seed + self.group.rank)  # the same weights, other dropout
        self._may_go_on()
        if recipe.model.pooling is Pooling.MEAN:
            encoded = self._features(learner, encoded, int(tokenizer.pad_token_id), new=saved is None)
        elif not self.group.sharded:  # whose parts are put together by name and shape
            vocabulary.narrow(learner, recipe.hyperparameters, encoded["train"].ids.values, int(tokenizer.pad_token_id))
        if self.group.leads:
            begun = restored[0] if restored else None
            checkpoints.begin(begun.step if begun else 0, (begun.name, begun.manifest.get("best")) if begun else ())
            sweep(self.output, f"{names.MODEL_DIR}/", self.console.line)
        checkpoints.execution = self.group.tell(checkpoints.execution)
        logs = scratch / "logs" / f"{checkpoints.execution:04d}"
        try:
            with self._trackers(checkpoints, logs) as trackers:
                loop = self._loop(learner, tokenizer, encoded, checkpoints, trackers, poster, restored)
                trackers.params(**recipe.model_dump(mode="json", by_alias=True), resolved=self._resolved(loop))
                loop.train()
                best = self._best(loop, checkpoints, tokenizer)
                return self._publish(best, loop, encoded, tokenizer, trackers)
        except Exception:
            checkpoints.settle()
            raise
        finally:
            if self.group.leads:
                self._upload_logs(logs, checkpoints.execution)

    def _trackers(self, checkpoints: Checkpoints, folder: Path) -> Trackers:
        if not self.group.leads:
            return Trackers()
        training = Training.of(self.runtime.job_name, self.recipe.digest(), checkpoints.origin, folder)
        return open_trackers(training, self.console.line)

    def _resolved(self, loop: "Loop") -> dict[str, Any]:
        """What the recipe left open."""
        return {
            "learningRate": loop.rate,
            "steps": loop.total_steps,
            "device": loop.device.type,
            "precision": loop.state.precision,
            "microBatchSize": loop.fit.at_once,
            "processes": self.group.size,
            **({"strategy": self.group.strategy} if self.group.strategy else {}),
        }

    def _restore(self, checkpoints: Checkpoints) -> tuple[Checkpoint, Path] | None:
        """The newest checkpoint that verifies, the same one at every process."""
        restored = checkpoints.restore() if self.group.leads else None
        chosen = self.group.tell(restored[0].name if restored else None)
        return restored if self.group.leads or chosen is None else self._fetch(checkpoints, chosen)

    def _fetch(self, checkpoints: Checkpoints, name: str) -> tuple[Checkpoint, Path]:
        checkpoint = next((c for c in checkpoints.committed() if c.name == name), None)
        folder = checkpoints.fetch(checkpoint) if checkpoint else None
        if checkpoint is None or folder is None:
            where = f"{checkpoints.store.uri}/{name}"
            raise TrainingFailure("CheckpointCorrupt", f"{where} cannot be read by process {self.group.rank}")
        return checkpoint, folder

    def _tell_truncation(self, encoded: dict[str, Encoded]) -> None:
        cut, rows = sum(e.truncated for e in encoded.values()), sum(len(e) for e in encoded.values())
        if cut:
            self.console.line(
                f"data: {cut} of {rows} texts reach dataset.maxLength ({self.recipe.dataset.max_length}) and are cut"
            )

    def _features(self, learner: "PreTrainedModel", encoded: dict[str, Encoded], pad: int, *, new: bool) -> dict[str, Encoded]:
        """What the frozen encoder makes of all splits, once; a new head is told the scale of the training data's."""
        from finetune_trainer import pooling

        began = time.monotonic()
        made = pooling.with_features(
            learner.to(self.group.device()), encoded, pad, self.group.device(), self.group, self._may_go_on
        )
        if new:
            numbers = made["train"].labels if self.recipe.task is Task.REGRESSION else None
            learner.linear_head.standardise(made["train"].features, numbers)
        rows, seconds = sum(len(split) for split in made.values()), time.monotonic() - began
        self.console.line(f"features: the encoder has read {rows} texts in {seconds:.1f} s and is done")
        return made

    def _loop(
        self,
        learner: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        encoded: dict[str, Encoded],
        checkpoints: Checkpoints,
        trackers: Trackers,
        poster: Poster,
        restored: tuple[Checkpoint, Path] | None,
    ) -> "Loop":
        from finetune_trainer.loop import Loop

        latest: dict[str, Any] = {"left": 0.0, "values": {}, "scores": []}

        def tell(*, urgent: bool = False) -> None:
            status = trainer_status(loop.state.step, loop.total_steps, latest["left"], latest["values"], latest["scores"])
            evaluations = thin([Evaluation.model_validate(e) for e in loop.state.evaluations])
            poster.tell(ProgressReport(trainer_status=status, evaluations=evaluations, **self.facts), urgent=urgent)

        def on_step(loss: float, rate: float) -> None:
            latest["left"] = self.console.step(loop.state.step, loop.total_steps, loss, rate)
            if loss == loss:  # noqa: PLR0124  (not NaN: the first step's loss is read with the second)
                latest["values"] = {"loss": loss, "learning_rate": rate}
                trackers.scalars({"train/loss": loss, "train/learning_rate": rate}, loop.state.step)
            tell()

        def on_evaluation(scores: "Evaluated") -> None:
            latest["scores"] = scores.named("validation")
            trackers.scalars({f"validation/{n}": v for n, v in scores.values.items()}, loop.state.step)
            shown = "  ".join(f"{n} {v:.4f}" for n, v in scores.values.items())
            best = "  (best so far)" if loop.state.best_step == loop.state.step else ""
            self.console.line(f"step {loop.state.step}: validation  {shown}{best}")
            tell(urgent=True)

        def on_commit(checkpoint: Checkpoint) -> None:
            self.checkpoint = checkpoint.status(checkpoints.store)
            tell(urgent=True)

        loop = Loop(
            recipe=self.recipe,
            model=learner,
            kind=self.kind,
            train_data=encoded["train"],
            validation_data=encoded["validation"],
            pad=int(tokenizer.pad_token_id),
            checkpoints=checkpoints,
            save_model=lambda m, folder, weights, frozen: model_files.save(m, tokenizer, self.recipe, folder, weights, frozen),
            stopping=self.stopping,
            on_step=on_step,
            on_evaluation=on_evaluation,
            on_commit=on_commit,
            base=model_files.digest(self.source) if self.recipe.model.partly_saved else "",
            group=self.group,
            resumed=restored[1] if restored else None,
        )
        if restored:
            self.checkpoint = self.resumed_from = restored[0].status(checkpoints.store)
            self.console.line(f"going on from step {loop.state.step} of {loop.total_steps} ({self.resumed_from.uri})")
        tell(urgent=True)
        return loop

    # ----------------------------------------------------------------------------------------------- score, publish ----
    def _best(self, loop: "Loop", checkpoints: Checkpoints, tokenizer: "PreTrainedTokenizerBase") -> "PreTrainedModel":
        """The model of the best evaluation: the one in memory, or the one in its checkpoint. At every process: all score it."""
        if loop.state.best_step in (None, loop.state.step):
            return loop.model
        # Told by the leader, which has waited until it is committed.
        name = self.group.tell(loop.state.best_checkpoint)
        found = self._fetch(checkpoints, name)[1] / "model"
        self.console.line(f"the best model is that of step {loop.state.best_step}; it is restored")
        source = self.source if self.recipe.model.partly_saved else found
        take_over(loop.model, model.build(source, self.recipe, self.kind, tokenizer, found))
        return loop.model

    def _publish(
        self,
        best: "PreTrainedModel",
        loop: "Loop",
        encoded: dict[str, Encoded],
        tokenizer: "PreTrainedTokenizerBase",
        trackers: Trackers,
    ) -> EndReport:
        """Scores the best model, test data included; the leader writes model/ and then result.json."""
        from finetune_trainer import snapshot

        merge = self.recipe.model.lora is not None and self.recipe.model.lora.merge
        if merge and not self.group.sharded:
            adapters.merge(best)
        scores = {s: loop.scores(best, e) for s, e in encoded.items() if s != "train"}
        weights = snapshot.weights(best, self.group)
        self.group.tell(None)  # nobody goes away before the leader has all parts
        if not self.group.leads:
            return EndReport(outcome=Outcome.COMPLETE, step=loop.state.step)
        if merge and self.group.sharded:
            best = self._merged(best, weights, tokenizer)
            weights = snapshot.weights(best, ALONE)
        metrics: list[MetricValue] = [m for split, score in scores.items() for m in score.named(split)]
        for split, score in scores.items():
            trackers.scalars({f"final/{split}/{n}": v for n, v in score.values.items()}, loop.state.step)
        folder = self.runtime.workdir / "final"
        if folder.exists():  # `finetune run` keeps it, whatever it trained before
            shutil.rmtree(folder)
        model_files.save(best, tokenizer, self.recipe, folder, weights)
        if self.recipe.model.pooling is Pooling.MEAN:
            best.encoder.save_pretrained(folder, max_shard_size=model_files.ONE_FILE)
        loop.checkpoints.check_not_replaced()  # a newer execution's result is not to be deleted
        replace_model(self.output, {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()})
        result = Result(
            model_uri=f"{self.output.uri}/{names.MODEL_DIR}", metrics=metrics, best_step=loop.state.best_step or loop.state.step
        )
        file = ResultFile(
            recipe_digest=self.recipe.digest(),
            result=result,
            recipe=self.recipe.model_dump(mode="json", by_alias=True, exclude_none=True),
            resolved=self._resolved(loop),
            data=self.counts,
            evaluations=[Evaluation.model_validate(e) for e in loop.state.evaluations],
            per_class={split: score.per_class for split, score in scores.items() if score.per_class},
            steps=loop.state.step,
            examples=loop.state.examples,
            started=self.started,
            finished=datetime.now(UTC),
            versions={package: version(package) for package in ("torch", "transformers", "peft", "finetune-operator")},
        )
        self.output.put(names.RESULT_FILE, file.model_dump_json(by_alias=True, exclude_none=True, indent=1).encode())
        return EndReport(
            outcome=Outcome.COMPLETE,
            step=loop.state.step,
            result=result,
            evaluations=thin(file.evaluations),
            **self.facts,
        )

    def _merged(self, trained: "PreTrainedModel", weights: "Weights", tokenizer: "PreTrainedTokenizerBase") -> "PreTrainedModel":
        """The adapters of a model that is cut up, in the weights of a whole one; that is put together in the leader's memory."""
        folder = self.runtime.workdir / "adapters"
        adapters.save(trained, folder, weights)
        whole = model.build(self.source, self.recipe, self.kind, tokenizer, folder)
        adapters.merge(whole)
        return whole

    def _upload_logs(self, folder: Path, execution: int) -> None:
        try:
            place = open_store(self.recipe.output.storage_uri, self.runtime.s3_root, patience=LOGS_PATIENCE)
            upload_folder(folder, place, f"{names.LOGS_DIR}/{execution:04d}")
        except (TrainingFailure, OSError) as error:
            # Logs are no reason to lose a trained model; where the storage is gone, the training has failed by itself. A tracker that
            # was left behind may still be at work on its files.
            self.console.line(f"logs were not uploaded: {getattr(error, 'message', error)}")


LOGS_PATIENCE = 10.0
"""Seconds: at the end of a pod there is little time, and logs are the least of what is lost with a storage."""
SAVING_SHARE = 0.7
"""Of the time that a process has to end, for the last save to arrive: then there is still time to say that it did not."""
_OTHER = "change output.storageUri, or set output.overwrite: true to replace it"


def thin(evaluations: list[Evaluation]) -> list[Evaluation]:
    """At most 64, first and last kept: what a status may hold."""
    while len(evaluations) > 64:
        evaluations = [*evaluations[:-1:2], evaluations[-1]]
    return evaluations


def take_over(trained: "PreTrainedModel", stored: "PreTrainedModel") -> None:
    """Gives a model the weights of one that stays on the CPU: an accelerator that holds all of a training may have no room for two."""
    import torch

    from finetune_trainer import sharding, vocabulary

    rows = {f"{name}.weight": module.used.cpu() for name, module in vocabulary.narrowed(trained)}
    weights = stored.state_dict()
    with torch.no_grad():
        for name, place in trained.state_dict().items():
            value = weights[name][rows[name]] if name in rows else weights[name]
            place.copy_(sharding.part(value, place))


def replace_model(output: Store, files: Mapping[str, Path]) -> None:
    """Makes these files, by their names, all that is under model/.

    With output.overwrite another recipe's result and model are still there. The result goes first: a death in between must not leave it
    beside our model. No file of the other model may stay: adapters beside a whole model would be loaded over it.
    """
    output.delete(names.RESULT_FILE)
    uploads = {f"{names.MODEL_DIR}/{name}": path for name, path in sorted(files.items())}
    for key in output.list(f"{names.MODEL_DIR}/"):
        if key not in uploads:
            output.delete(key)
    for key, path in uploads.items():
        output.upload(path, key)


def upload_folder(folder: Path, store: Store, prefix: str) -> None:
    """Every file of the folder under the prefix."""
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        store.upload(path, f"{prefix}/{path.relative_to(folder).as_posix()}")
