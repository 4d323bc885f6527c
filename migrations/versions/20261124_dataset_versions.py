"""versions of a dataset, and the files that it has published

Revision ID: 20261124_dataset_versions
Revises: 20261123_initial
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "20261124_dataset_versions"
down_revision = "20261123_initial"
branch_labels = None
depends_on = None

_JSON = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")


def upgrade() -> None:
    with op.batch_alter_table("dataset", schema=None) as batch_op:
        batch_op.add_column(sa.Column("upload_id", sa.String(length=48), nullable=True))
        batch_op.add_column(sa.Column("version", sa.Integer(), nullable=True))
        batch_op.add_column(sa.Column("parent_id", sa.String(length=48), nullable=True))
        batch_op.add_column(sa.Column("files", _JSON, nullable=True))
    dataset = sa.table(
        "dataset", sa.column("id"), sa.column("upload_id"), sa.column("version"),
        sa.column("files", _JSON),
    )
    op.execute(dataset.update().values(upload_id=dataset.c.id, version=1, files=[]))
    with op.batch_alter_table("dataset", schema=None) as batch_op:
        batch_op.alter_column("upload_id", existing_type=sa.String(length=48), nullable=False)
        batch_op.alter_column("version", existing_type=sa.Integer(), nullable=False)
        batch_op.alter_column("files", existing_type=_JSON, nullable=False)
        batch_op.create_unique_constraint(
            batch_op.f("uq_dataset_upload_id_version"), ["upload_id", "version"]
        )


def downgrade() -> None:
    with op.batch_alter_table("dataset", schema=None) as batch_op:
        batch_op.drop_constraint(batch_op.f("uq_dataset_upload_id_version"), type_="unique")
        for name in ("files", "parent_id", "version", "upload_id"):
            batch_op.drop_column(name)
