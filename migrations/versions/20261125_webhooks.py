"""webhooks and their deliveries; files, and uploads in parts; kept checkpoints

Revision ID: 20261125_webhooks
Revises: 20261125_replays
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import SchemaItem

revision = "20261125_webhooks"
down_revision = "20261125_replays"
branch_labels = None
depends_on = None

_JSON = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")


def upgrade() -> None:
    _files()
    _uploads()
    _webhooks()
    with op.batch_alter_table("checkpoint", schema=None) as batch_op:
        batch_op.add_column(sa.Column("title", sa.String(length=200), nullable=True))
        batch_op.add_column(sa.Column("pinned", sa.Boolean(), nullable=True))
        batch_op.add_column(sa.Column("expires_at", sa.Double(), nullable=True))
        batch_op.add_column(sa.Column("warned_h", sa.Integer(), nullable=True))
        batch_op.add_column(sa.Column("deleted_at", sa.Double(), nullable=True))
        batch_op.create_index(batch_op.f("ix_checkpoint_expires_at"), ["expires_at"])
    checkpoint = sa.table("checkpoint", sa.column("pinned", sa.Boolean()))
    op.execute(checkpoint.update().values(pinned=False))
    with op.batch_alter_table("checkpoint", schema=None) as batch_op:
        batch_op.alter_column("pinned", existing_type=sa.Boolean(), nullable=False)


def downgrade() -> None:
    with op.batch_alter_table("checkpoint", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_checkpoint_expires_at"))
        for name in ("deleted_at", "warned_h", "expires_at", "pinned", "title"):
            batch_op.drop_column(name)
    for table in ("webhook_delivery", "webhook", "upload_part", "upload_session", "file"):
        op.drop_table(table)


def _identified(table: str) -> list[SchemaItem]:
    return [
        sa.Column("id", sa.String(length=48), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f(f"pk_{table}")),
    ]


def _owned(table: str) -> list[SchemaItem]:
    return [
        sa.Column("owner_id", sa.String(length=48), nullable=False),
        sa.ForeignKeyConstraint(
            ["owner_id"], ["owner.id"], name=op.f(f"fk_{table}_owner_id_owner")
        ),
    ]


def _indexes(table: str, *columns: str) -> None:
    with op.batch_alter_table(table, schema=None) as batch_op:
        for column in columns:
            batch_op.create_index(batch_op.f(f"ix_{table}_{column}"), [column])


def _files() -> None:
    op.create_table(
        "file",
        sa.Column("filename", sa.String(length=255), nullable=False),
        sa.Column("purpose", sa.String(length=40), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("dataset_id", sa.String(length=48), nullable=True),
        sa.Column("expires_at", sa.Double(), nullable=True),
        sa.ForeignKeyConstraint(
            ["dataset_id"], ["dataset.id"], name=op.f("fk_file_dataset_id_dataset")
        ),
        *_identified("file"),
        *_owned("file"),
    )
    _indexes("file", "owner_id", "dataset_id", "expires_at")


def _uploads() -> None:
    op.create_table(
        "upload_session",
        sa.Column("filename", sa.String(length=255), nullable=False),
        sa.Column("purpose", sa.String(length=40), nullable=False),
        sa.Column("mime_type", sa.String(length=200), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("status", sa.String(length=40), nullable=False),
        sa.Column("expires_at", sa.Double(), nullable=False),
        sa.Column("file_ttl_s", sa.Integer(), nullable=True),
        sa.Column("file_id", sa.String(length=48), nullable=True),
        *_identified("upload_session"),
        *_owned("upload_session"),
    )
    _indexes("upload_session", "owner_id", "status")
    op.create_table(
        "upload_part",
        sa.Column("upload_id", sa.String(length=48), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.ForeignKeyConstraint(
            ["upload_id"], ["upload_session.id"],
            name=op.f("fk_upload_part_upload_id_upload_session"),
        ),
        sa.UniqueConstraint("upload_id", "sha256", name=op.f("uq_upload_part_upload_id_sha256")),
        *_identified("upload_part"),
    )


def _webhooks() -> None:
    op.create_table(
        "webhook",
        sa.Column("url", sa.String(length=2048), nullable=False),
        sa.Column("description", sa.String(length=500), nullable=False),
        sa.Column("events", _JSON, nullable=False),
        sa.Column("enabled", sa.Boolean(), nullable=False),
        sa.Column("disabled_reason", sa.String(length=500), nullable=True),
        sa.Column("secret", sa.String(length=100), nullable=False),
        sa.Column("previous_secret", sa.String(length=100), nullable=True),
        sa.Column("previous_until", sa.Double(), nullable=True),
        *_identified("webhook"),
        *_owned("webhook"),
    )
    _indexes("webhook", "owner_id")
    op.create_table(
        "webhook_delivery",
        sa.Column("webhook_id", sa.String(length=48), nullable=False),
        sa.Column("event_id", sa.String(length=48), nullable=False),
        sa.Column("type", sa.String(length=40), nullable=False),
        sa.Column("object_id", sa.String(length=64), nullable=False),
        sa.Column("status", sa.String(length=40), nullable=False),
        sa.Column("tries", sa.Integer(), nullable=False),
        sa.Column("due_at", sa.Double(), nullable=False),
        sa.Column("attempts", _JSON, nullable=False),
        sa.Column("delivered_at", sa.Double(), nullable=True),
        sa.ForeignKeyConstraint(
            ["webhook_id"], ["webhook.id"], name=op.f("fk_webhook_delivery_webhook_id_webhook")
        ),
        *_identified("webhook_delivery"),
        *_owned("webhook_delivery"),
    )
    _indexes("webhook_delivery", "owner_id")
    with op.batch_alter_table("webhook_delivery", schema=None) as batch_op:
        batch_op.create_index("ix_webhook_delivery_webhook_id_id", ["webhook_id", "id"])
        batch_op.create_index(
            "ix_webhook_delivery_due", ["due_at"],
            postgresql_where=sa.text("status = 'pending'"),
            sqlite_where=sa.text("status = 'pending'"),
        )
