"""What a named model makes of a dataset, in its report. Needs a tokenizer and no weights."""

from dataclasses import replace

from transformers import AutoConfig

from core.errors import InvalidInput, RunAborted
from core.hub import fetch_tokenizer, resolve
from core.lifecycle import DatasetStatus
from core.run_spec import DatasetPolicy, TrainSpec
from core.settings import Settings
from worker.ingest.pipeline import IngestResult
from worker.training.token_report import Limit, TokenSample
from worker.training.tokenize import load_tokenizer, positions_of


class DatasetTokens(TokenSample):
    """A sample of a dataset's pairs that goes into its report."""

    def added_to(self, result: IngestResult) -> IngestResult:
        """Return the result with what the tokenizer said; a warning changes its status.

        Without a pair that could be tokenised the report has no tokens.
        """
        found, refusals = self.report(result.raw), self.refusals()
        listed = result.report["lint"]
        assert isinstance(listed, list)
        lint = [*listed]
        report = {**result.report, "lint": lint}
        if refusals is not None:
            lint.append(refusals.model_dump(mode="json"))
        if found is not None:
            lint.append(found.truncation.model_dump(mode="json"))
            data = found.model_dump(mode="json")
            report |= {"tokens": data["tokens"], "preview": data["preview"]}
        status = result.status
        if status is DatasetStatus.READY and any(check["level"] == "warn" for check in lint):
            status = DatasetStatus.READY_WITH_WARNINGS
        return replace(result, status=status, report={**report, "status": status.value})


def open_sample(policy: DatasetPolicy, settings: Settings) -> DatasetTokens:
    """Return what looks at the pairs with the tokenizer of the policy's model.

    Raises:
        InvalidInput, NotPermitted: there is no such model, or it may not or cannot be used.
        Unavailable: the hub does not answer.
    """
    assert policy.model is not None
    folder = fetch_tokenizer(resolve(policy.model, settings), settings)
    try:
        tokenizer = load_tokenizer(folder)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except RunAborted as error:
        raise InvalidInput(error.message, code="model_not_found", hint=error.hint) from error
    except (OSError, ValueError, KeyError) as error:
        raise InvalidInput(
            f"the configuration in {folder} cannot be read: {type(error).__name__}",
            code="model_not_found",
            hint="the folder needs the config.json that save_pretrained wrote",
        ) from error
    return DatasetTokens(
        tokenizer,
        name=policy.model,
        limit=Limit(policy.max_length or TrainSpec().max_length, positions_of(config)),
    )
