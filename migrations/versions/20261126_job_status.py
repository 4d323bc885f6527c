"""lists of jobs by their status, and of all kinds by age

Revision ID: 20261126_job_status
Revises: 20261126_evaluations
"""

from alembic import op

revision = "20261126_job_status"
down_revision = "20261126_evaluations"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("job", schema=None) as batch_op:
        batch_op.create_index("ix_job_status", ["owner_id", "status", "id"], unique=False)
        batch_op.create_index("ix_job_newest", ["owner_id", "created_at", "id"], unique=False)


def downgrade() -> None:
    with op.batch_alter_table("job", schema=None) as batch_op:
        batch_op.drop_index("ix_job_newest")
        batch_op.drop_index("ix_job_status")
