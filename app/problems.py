"""What every error code means, at the address that a problem's `type` names."""

from typing import Annotated

from fastapi import APIRouter, Path

from app.errors import title_of
from app.responses import Schema
from core.errors import NotFound

router = APIRouter(prefix="/problems", tags=["problems"])

EXPLANATIONS = {
    "answer_not_kept": "The request was done before, and its answer is one that is never stored, "
    "such as a new secret.",
    "broker_unavailable": "The message broker does not answer. Work is kept and sent later.",
    "budget_reached": "The search has as many trials as `max_trials` allows. Raise it first.",
    "cancel_requested": "The job was asked to stop.",
    "canonical_damaged": "The stored rows of a dataset have changed on disk. Upload it again.",
    "checkpoint_corrupt": "A file of the checkpoint is not the one that was published.",
    "checkpoint_not_adapter": "Only an adapter can be merged into its base model, or measured "
    "against it.",
    "checkpoint_in_use": "A job that has not ended makes or reads the checkpoint.",
    "conflict": "The object is in a state that does not allow this request.",
    "corrupt_arrow": "The Arrow file is damaged or cut off. Write it again.",
    "corrupt_arrow_stream": "The Arrow stream is damaged or cut off. Write it again.",
    "corrupt_gzip": "The gzip stream is damaged. Compress the file again.",
    "corrupt_json": "The JSON of the file is damaged: there is text behind its end.",
    "corrupt_parquet": "The Parquet file is damaged or cut off. Write it again.",
    "corrupt_tar": "The tar archive is damaged, or packed in a way that is not read.",
    "corrupt_xz": "The xz stream is damaged. Compress the file again.",
    "corrupt_zip": "The zip archive is damaged, or packed in a way that is not read.",
    "corrupt_zstd": "The zstd stream is damaged. Compress the file again.",
    "dataset_in_use": "A job that has not ended names the dataset. Wait for it, or cancel it.",
    "dataset_invalid": "Too few rows of the dataset can become preference pairs; its report lists "
    "the faults with their lines.",
    "dataset_not_ready": "The dataset is still being validated, or was found invalid.",
    "decompression_bomb": "The compressed file grows far more than preference data do.",
    "dependency_error": "Something that the job needs (the hub, the database) did not answer.",
    "disk_full": "The disk of the server has no room left.",
    "empty_file": "The file has no rows.",
    "encrypted_archive": "A file in the archive is encrypted. Pack it again without a password.",
    "file_not_dataset": "No dataset is made of files of this purpose. Upload it with fine-tune.",
    "file_too_large": "The file is larger than this server takes.",
    "foreign_origin": "This server asks for no keys, and the request came under a name that is not "
    "this machine's, or from a web page of somebody else.",
    "hub_off": "This server does not ask the hub; its settings or its environment say so.",
    "http_error": "The request does not follow HTTP; the detail says how.",
    "idempotency_key_reused": "The `Idempotency-Key` was sent before with another body. Make a new "
    "key for each new request.",
    "internal": "kdpo failed in a way that it should not. The server's log has the reason.",
    "invalid_api_key": "The API key is unknown, revoked or expired.",
    "invalid_input": "The request can be read and says something that cannot be done; `errors` "
    "points at each place.",
    "job_not_cancellable": "Only a job that has not ended can be cancelled.",
    "job_not_pausable": "Only a queued or running job that is not to be cancelled can be paused.",
    "job_not_resumable": "The job has ended. Only a paused job can be resumed.",
    "job_not_retryable": "Only a job that has failed or was cancelled can be retried, and not one "
    "that validates data.",
    "line_too_long": "A line of the file is longer than this server takes.",
    "link_expired": "The time of the signed link is over. Ask for another one.",
    "link_invalid": "The signature of the link does not fit what it links to.",
    "malformed_request": "The request cannot be read, for example because its body is not JSON.",
    "method_not_allowed": "The path is there and does not take this method.",
    "missing_api_key": "The request has no header `Authorization: Bearer …`.",
    "missing_file": "The multipart body has no part named `file`.",
    "missing_scope": "The API key is valid and lacks the scope that this endpoint needs.",
    "model_damaged": "A file of the model cannot be used. Copy or download the model again.",
    "model_gated": "The model's owner must grant access first.",
    "model_needs_remote_code": "The model brings code of its own, which kdpo never runs.",
    "model_not_allowed": "This server may not take that model from the hub.",
    "model_not_found": "There is no such model, or its files cannot be read.",
    "model_not_reward_model": "Answers are judged by a sequence classifier with one output.",
    "model_not_safetensors": "The model has no safetensors files; pickles are not read.",
    "model_unreachable": "The hub does not answer, and the model is not in the local cache.",
    "not_found": "There is no such path or object, or it belongs to somebody else.",
    "option_ignored": "An option has no meaning for the layout of the file and would be ignored. "
    "Drop it.",
    "overloaded": "The server computes as many analyses as it does at once. Ask again shortly.",
    "precondition_failed": "The object has changed since the version that `If-Match` names.",
    "push_not_allowed": "The server's settings do not allow it to push to that repository.",
    "push_refused": "The hub does not take the push: the token may not write there, or the name is "
    "bad.",
    "quota_exceeded": "The owner would pass a limit; `quota` says which, what is used, and when "
    "there is room.",
    "range_not_satisfiable": "The range begins behind the end of the file.",
    "rate_limit_exceeded": "The API key asks too often. Wait as long as `Retry-After` says.",
    "recommendation_not_ready": "The recommendation has no final answer yet, or ended without one.",
    "request_in_progress": "A request with the same `Idempotency-Key` is still worked on. Send it "
    "again shortly.",
    "source_address_blocked": "The host of the source has an address that this server may not "
    "connect to: a private, loopback, link-local, metadata or multicast one.",
    "source_ambiguous": "The repository has several configurations or splits. Name one.",
    "source_changed": "The source is not the one that was asked for, or changed while it was read.",
    "source_gated": "The dataset's owner must grant access first, and the request name a token.",
    "source_not_allowed": "This server's settings do not allow it to take datasets from there.",
    "source_not_found": "There is no such repository, revision, configuration, split or file.",
    "source_refused": "The server of the source refuses to give the file, or cannot be trusted.",
    "source_too_slow": "The source took longer than this server waits.",
    "source_unreachable": "The server of the source does not answer as it should.",
    "source_unreadable": "The source is there and holds nothing that can be read as data.",
    "study_busy": "Others changed the search at the same moment. Read it, and change it again.",
    "study_ended": "The search has ended or is being cancelled, and takes no more orders. Clone it "
    "to go on from what it knows.",
    "too_few_pairs": "The dataset has too few distinct preference pairs.",
    "too_few_prompts": "The dataset has too few distinct prompts.",
    "too_large": "The request is larger than this server takes.",
    "too_many_comparisons": "One prompt has so many answers that comparing all of them is "
    "refused; choose another `pairing`.",
    "too_many_streams": "The API key has as many event streams open as it may. Close one.",
    "too_many_requests": "The caller has as much of something at once as it may. Try again later.",
    "too_many_members": "The archive holds more files than this server takes.",
    "too_many_webhooks": "You have as many webhooks as this server takes. Delete one.",
    "too_many_rows": "The file has more rows than this server takes.",
    "trial_exists": "The search has a trial with this very setting already.",
    "trial_not_failed": "Only a trial that failed or was cut by its limit of time can be tried "
    "again.",
    "truncated_gzip": "The gzip stream was cut off. Upload the whole file again.",
    "truncated_json": "The JSON of the file was cut off. Upload the whole file again.",
    "truncated_xz": "The xz stream was cut off. Upload the whole file again.",
    "truncated_zstd": "The zstd stream was cut off. Upload the whole file again.",
    "unavailable": "A service that kdpo needs does not answer. Try again shortly.",
    "unknown_secret": "The server's settings have no secret of that name.",
    "upload_gone": "The stored file that the dataset was read from is gone. Send it again.",
    "unknown_parameter": "The endpoint does not know this parameter and would ignore it.",
    "unsafe_archive": "The archive holds a link, or a name that leads out of it.",
    "unsupported_media_type": "kdpo does not read this type of content.",
    "unusable_layout": "The rows of the file do not have the fields of the layout that was named.",
    "unusable_url": "The URL of the source is no plain https address.",
    "unusable_mapping": "`column_mapping` names columns that the file lacks, or fields that no "
    "layout has.",
    "upload_damaged": "The file that the parts make has another MD5 than was announced.",
    "upload_not_pending": "The upload was completed or cancelled, or has expired.",
    "upload_size_mismatch": "The parts that were named have other bytes together than announced.",
    "upload_too_long": "The parts of the upload would have more bytes than were announced.",
    "webhook_disabled": "The webhook is switched off. Switch it on first.",
    "webhook_host_not_allowed": "This server's settings do not list the host of the webhook.",
}


class Explanation(Schema):
    """What an error code means."""

    code: str
    title: str
    explanation: str


@router.get("/{code}", operation_id="explain_problem")
def explain_problem(code: Annotated[str, Path(max_length=64)]) -> Explanation:
    """Say what an error code means; no key is needed."""
    explanation = EXPLANATIONS.get(code)
    if explanation is None:
        raise NotFound(f"there is no error code {code!r}", hint="codes are in a problem's `code`")
    return Explanation(code=code, title=title_of(code), explanation=explanation)
