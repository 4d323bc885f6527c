"""sources of datasets: what was asked for, and what it was resolved to

Revision ID: 20261124_dataset_sources
Revises: 20261124_dataset_versions
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "20261124_dataset_sources"
down_revision = "20261124_dataset_versions"
branch_labels = None
depends_on = None

_JSON = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")


def upgrade() -> None:
    with op.batch_alter_table("dataset", schema=None) as batch_op:
        batch_op.add_column(sa.Column("source", _JSON, nullable=True))
        batch_op.add_column(sa.Column("origin", _JSON, nullable=True))
        batch_op.alter_column("bytes", existing_type=sa.BigInteger(), nullable=True)
        batch_op.alter_column("sha256", existing_type=sa.String(length=64), nullable=True)


def downgrade() -> None:
    # Datasets whose source was never fetched have no size: nothing else of them is known either.
    dataset = sa.table("dataset", sa.column("bytes"), sa.column("sha256"))
    op.execute(dataset.update().where(dataset.c.bytes.is_(None)).values(bytes=0, sha256=""))
    with op.batch_alter_table("dataset", schema=None) as batch_op:
        batch_op.alter_column("sha256", existing_type=sa.String(length=64), nullable=False)
        batch_op.alter_column("bytes", existing_type=sa.BigInteger(), nullable=False)
        for name in ("origin", "source"):
            batch_op.drop_column(name)
