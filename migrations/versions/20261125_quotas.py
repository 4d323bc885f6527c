"""limits of owners and keys, turns of owners, and who did what

Revision ID: 20261125_quotas
Revises: 20261125_webhooks
"""

import sqlalchemy as sa
from alembic import op

revision = "20261125_quotas"
down_revision = "20261125_webhooks"
branch_labels = None
depends_on = None

_QUEUED = sa.text("status = 'queued'")
_RUNNING = sa.text("status = 'running'")
_LIMITS = (
    "running_jobs", "queued_jobs", "gpu_seconds_month", "stored_bytes", "dataset_rows",
    "upload_bytes",
)


def upgrade() -> None:
    op.create_table(
        "quota",
        sa.Column("subject", sa.String(length=48), nullable=False),
        *(sa.Column(name, sa.BigInteger(), nullable=True) for name in _LIMITS),
        sa.PrimaryKeyConstraint("subject", name=op.f("pk_quota")),
    )
    op.create_table(
        "gpu_usage",
        sa.Column("owner_id", sa.String(length=48), nullable=False),
        sa.Column("day", sa.Date(), nullable=False),
        sa.Column("kind", sa.String(length=40), nullable=False),
        sa.Column("seconds", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(
            ["owner_id"], ["owner.id"], name=op.f("fk_gpu_usage_owner_id_owner")
        ),
        sa.PrimaryKeyConstraint("owner_id", "day", "kind", name=op.f("pk_gpu_usage")),
    )
    op.create_table(
        "queue_turn",
        sa.Column("owner_id", sa.String(length=48), nullable=False),
        sa.Column("queue", sa.String(length=40), nullable=False),
        sa.Column("served_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(
            ["owner_id"], ["owner.id"], name=op.f("fk_queue_turn_owner_id_owner")
        ),
        sa.PrimaryKeyConstraint("owner_id", "queue", name=op.f("pk_queue_turn")),
    )
    op.create_table(
        "audit_entry",
        sa.Column("id", sa.String(length=48), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("owner_id", sa.String(length=48), nullable=False),
        sa.Column("key_id", sa.String(length=48), nullable=True),
        sa.Column("operation", sa.String(length=80), nullable=False),
        sa.Column("object_id", sa.String(length=100), nullable=True),
        sa.Column("method", sa.String(length=10), nullable=False),
        sa.Column("path", sa.String(length=500), nullable=False),
        sa.Column("status", sa.Integer(), nullable=False),
        sa.Column("address", sa.String(length=64), nullable=True),
        sa.Column("request_id", sa.String(length=48), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit_entry")),
    )
    op.create_index("ix_audit_entry_owner", "audit_entry", ["owner_id", "id"])
    op.create_index("ix_audit_entry_object", "audit_entry", ["object_id", "id"])
    op.create_index("ix_audit_entry_created_at", "audit_entry", ["created_at"])
    with op.batch_alter_table("api_key", schema=None) as batch_op:
        batch_op.add_column(sa.Column("requests_per_minute", sa.Integer(), nullable=True))
    with op.batch_alter_table("worker", schema=None) as batch_op:
        batch_op.add_column(sa.Column("drain_requested_at", sa.Double(), nullable=True))
    op.create_index("ix_job_attempt_worker", "job_attempt", ["worker_id", "ended_at"])
    op.create_index(
        "ix_job_running", "job", ["owner_id"], postgresql_where=_RUNNING, sqlite_where=_RUNNING
    )
    op.drop_index("ix_job_claim", table_name="job")
    op.create_index(
        "ix_job_claim", "job", ["queue", "owner_id", sa.desc("priority"), "created_at", "id"],
        postgresql_where=_QUEUED, sqlite_where=_QUEUED,
    )


def downgrade() -> None:
    op.drop_index("ix_job_claim", table_name="job")
    op.create_index(
        "ix_job_claim", "job", ["queue", "priority", "run_after", "id"],
        postgresql_where=_QUEUED, sqlite_where=_QUEUED,
    )
    op.drop_index("ix_job_running", table_name="job")
    op.drop_index("ix_job_attempt_worker", table_name="job_attempt")
    with op.batch_alter_table("worker", schema=None) as batch_op:
        batch_op.drop_column("drain_requested_at")
    with op.batch_alter_table("api_key", schema=None) as batch_op:
        batch_op.drop_column("requests_per_minute")
    op.drop_table("audit_entry")
    op.drop_table("queue_turn")
    op.drop_table("gpu_usage")
    op.drop_table("quota")
