"""Owners and API keys."""

from sqlalchemy import bindparam, func, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from core.ids import IdPrefix, new_id
from models.owner import ApiKey, Owner
from models.repositories.paging import Page, PageQuery, fetch_page
from models.types import db_now

# Asked with every request: it is put together once.
_USABLE_KEY = select(ApiKey).where(
    ApiKey.secret_sha256 == bindparam("secret_sha256"),
    ApiKey.revoked_at.is_(None),
    or_(ApiKey.expires_at.is_(None), ApiKey.expires_at > db_now()),
)


class OwnerRepository:
    """Reads and writes of owners and keys in one transaction."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def ensure(self, name: str) -> Owner:
        """Return the owner of that name, made if missing."""
        owner = self.find(name)
        if owner is not None:
            return owner
        made = Owner(id=new_id(IdPrefix.OWNER), name=name)
        try:
            with self._session.begin_nested():
                self._session.add(made)
        except IntegrityError:  # another request was faster
            return self._session.execute(select(Owner).where(Owner.name == name)).scalar_one()
        return made

    def count_keys(self) -> int:
        """Return how many keys can be used."""
        usable = select(func.count()).select_from(ApiKey).where(ApiKey.revoked_at.is_(None))
        return self._session.execute(usable).scalar_one()

    def add_key(
        self,
        *,
        owner_id: str,
        name: str,
        prefix: str,
        secret_sha256: str,
        scopes: list[str],
        expires_at: float | None = None,
        requests_per_minute: int | None = None,
    ) -> ApiKey:
        """Insert a key by its hash."""
        key = ApiKey(
            id=new_id(IdPrefix.API_KEY),
            owner_id=owner_id,
            name=name,
            prefix=prefix,
            secret_sha256=secret_sha256,
            scopes=scopes,
            expires_at=expires_at,
            requests_per_minute=requests_per_minute,
        )
        self._session.add(key)
        self._session.flush()
        return key

    def find_usable_key(self, secret_sha256: str) -> ApiKey | None:
        """Return the key with that hash unless it is revoked or has expired."""
        told = {"secret_sha256": secret_sha256}
        return self._session.execute(_USABLE_KEY, told).scalar_one_or_none()

    def find(self, name: str) -> Owner | None:
        """Return the owner of that name."""
        return self._session.execute(select(Owner).where(Owner.name == name)).scalar_one_or_none()

    def get(self, owner_id: str) -> Owner:
        """Return an owner that is known to be there."""
        return self._session.get_one(Owner, owner_id)

    def find_id(self, owner_id: str) -> Owner | None:
        """Return the owner with that id."""
        return self._session.get(Owner, owner_id)

    def find_key(self, key_id: str) -> ApiKey | None:
        """Return the key with that id."""
        return self._session.get(ApiKey, key_id)

    def key_page(
        self, query: PageQuery, *, owner_name: str | None = None
    ) -> Page[tuple[ApiKey, Owner]]:
        """Return one page of the keys with their owners; of one owner if that is named."""
        statement = select(ApiKey)
        if owner_name is not None:
            named = select(Owner.id).where(Owner.name == owner_name).scalar_subquery()
            statement = statement.where(ApiKey.owner_id == named)
        page = fetch_page(self._session, statement, ApiKey.id, query)
        rows = [(key, self.get(key.owner_id)) for key in page.rows]
        return Page(rows=rows, has_more=page.has_more)

    def list_keys(self) -> list[ApiKey]:
        """Return all keys, oldest first."""
        return list(self._session.execute(select(ApiKey).order_by(ApiKey.id)).scalars())

    def revoke_key(self, key_id: str) -> bool:
        """Make a key useless; False when there is no such usable key."""
        revoked = (
            update(ApiKey)
            .where(ApiKey.id == key_id, ApiKey.revoked_at.is_(None))
            .values(revoked_at=db_now())
            .returning(ApiKey.id)
        )
        return self._session.execute(revoked).one_or_none() is not None

    def touch_key(self, key_id: str, *, older_than_s: float = 60.0) -> None:
        """Note that the key was used, at most once a minute."""
        self._session.execute(
            update(ApiKey)
            .where(
                ApiKey.id == key_id,
                or_(
                    ApiKey.last_used_at.is_(None),
                    ApiKey.last_used_at < db_now() - older_than_s,
                ),
            )
            .values(last_used_at=db_now())
            .execution_options(synchronize_session=False)
        )
