"""answered prompts of evaluations

Revision ID: 20261126_evaluations
Revises: 20261125_quotas
"""

import sqlalchemy as sa
from alembic import op

revision = "20261126_evaluations"
down_revision = "20261125_quotas"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "answered_prompt",
        sa.Column("job_id", sa.String(length=48), nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("pair_id", sa.String(length=64), nullable=False),
        sa.Column("prompt", sa.Text(), nullable=False),
        sa.Column("base", sa.Text(), nullable=False),
        sa.Column("aligned", sa.Text(), nullable=False),
        sa.Column("base_reward", sa.Double(), nullable=True),
        sa.Column("aligned_reward", sa.Double(), nullable=True),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], name=op.f("fk_answered_prompt_job_id_job")),
        sa.PrimaryKeyConstraint("job_id", "number", name=op.f("pk_answered_prompt")),
    )


def downgrade() -> None:
    op.drop_table("answered_prompt")
