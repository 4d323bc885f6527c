"""answers kept for repeated requests; pauses that users ask for, and how a cancel is meant

Revision ID: 20261125_replays
Revises: 20261124_search_tasks
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "20261125_replays"
down_revision = "20261124_search_tasks"
branch_labels = None
depends_on = None

_JSON = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")


def upgrade() -> None:
    op.create_table(
        "replay",
        sa.Column("id", sa.String(length=48), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("caller_id", sa.String(length=48), nullable=False),
        sa.Column("method", sa.String(length=10), nullable=False),
        sa.Column("path", sa.String(length=1024), nullable=False),
        sa.Column("key", sa.String(length=255), nullable=False),
        sa.Column("fingerprint", sa.String(length=64), nullable=True),
        sa.Column("running_until", sa.Double(), nullable=True),
        sa.Column("job_id", sa.String(length=48), nullable=True),
        sa.Column("status", sa.Integer(), nullable=True),
        sa.Column("headers", _JSON, nullable=True),
        sa.Column("body", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_replay")),
        sa.UniqueConstraint(
            "caller_id", "method", "path", "key", name=op.f("uq_replay_caller_id_method_path_key")
        ),
    )
    op.create_index(op.f("ix_replay_created_at"), "replay", ["created_at"])
    with op.batch_alter_table("job", schema=None) as batch_op:
        batch_op.add_column(sa.Column("pause_requested_at", sa.Double(), nullable=True))
        batch_op.add_column(sa.Column("cancel_options", _JSON, nullable=True))


def downgrade() -> None:
    with op.batch_alter_table("job", schema=None) as batch_op:
        batch_op.drop_column("cancel_options")
        batch_op.drop_column("pause_requested_at")
    op.drop_index(op.f("ix_replay_created_at"), table_name="replay")
    op.drop_table("replay")
