"""The dataset that a request names: by its own id, or by the file that it was made of."""

from dataclasses import dataclass

from sqlalchemy.orm import Session

from core.ids import IdPrefix
from core.lifecycle import DatasetStatus
from models.repositories.datasets import DatasetRepository
from models.repositories.files import FileRepository


@dataclass(frozen=True)
class TrainingData:
    """A dataset that a job can be made from; `is_validating`: the job must wait for it."""

    dataset_id: str
    is_validating: bool


def training_data(
    session: Session, owner_id: str, name: str, *, lock: bool = False
) -> TrainingData:
    """Return the dataset behind an id; `lock` keeps it as it is in this transaction.

    A file may still be validated, since who uploads one is not told when that is done.

    Raises:
        NotFound: no such dataset or file.
        Conflict: the dataset cannot be used, or there is none.
    """
    datasets = DatasetRepository(session)
    if name.startswith(IdPrefix.FILE.value):
        dataset_id = FileRepository(session).dataset_id(owner_id, name)
        dataset = datasets.get(owner_id, dataset_id, lock=lock)
        if dataset.status is DatasetStatus.VALIDATING:
            return TrainingData(dataset_id, is_validating=True)
        name = dataset_id
    return TrainingData(datasets.get_usable(owner_id, name, lock=lock).id, is_validating=False)
