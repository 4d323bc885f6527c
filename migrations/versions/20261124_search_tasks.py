"""tasks of searches, and jobs with a parent

Revision ID: 20261124_search_tasks
Revises: 20261124_dataset_sources
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "20261124_search_tasks"
down_revision = "20261124_dataset_sources"
branch_labels = None
depends_on = None

_JSON = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")


def upgrade() -> None:
    with op.batch_alter_table("job", schema=None) as batch_op:
        batch_op.add_column(sa.Column("parent_id", sa.String(length=48), nullable=True))
        batch_op.create_foreign_key(
            batch_op.f("fk_job_parent_id_job"), "job", ["parent_id"], ["id"]
        )
        batch_op.create_index(batch_op.f("ix_job_parent_id"), ["parent_id"])
    with op.batch_alter_table("study", schema=None) as batch_op:
        for name, kind in (
            ("plan", _JSON),
            ("shape", sa.String(length=20)),
            ("quotes", _JSON),
            ("stopped_by", sa.String(length=20)),
            ("stop_reason", sa.String(length=500)),
            ("ended_at", sa.Double()),
        ):
            batch_op.add_column(sa.Column(name, kind, nullable=True))
    study = sa.table(
        "study",
        sa.column("plan", _JSON),
        sa.column("shape"),
        sa.column("quotes", _JSON),
        sa.column("created_at"),
        sa.column("ended_at"),
    )
    # Searches of before have no plan to go on with.
    op.execute(study.update().values(plan={}, shape="none", quotes=[], ended_at=study.c.created_at))
    with op.batch_alter_table("study", schema=None) as batch_op:
        batch_op.alter_column("plan", existing_type=_JSON, nullable=False)
        batch_op.alter_column("shape", existing_type=sa.String(length=20), nullable=False)
        batch_op.alter_column("quotes", existing_type=_JSON, nullable=False)
    with op.batch_alter_table("trial", schema=None) as batch_op:
        for column in (
            sa.Column("arm", sa.String(length=100), nullable=True),
            sa.Column("draw", sa.Integer(), nullable=True),
            sa.Column("repeat", sa.Integer(), nullable=True),
            sa.Column("setting", _JSON, nullable=True),
            sa.Column("rung", sa.Integer(), nullable=True),
        ):
            batch_op.add_column(column)
    trial = sa.table(
        "trial",
        sa.column("number"),
        sa.column("arm"),
        sa.column("draw"),
        sa.column("repeat"),
        sa.column("setting", _JSON),
    )
    op.execute(trial.update().values(arm="", draw=trial.c.number, repeat=0, setting={}))
    with op.batch_alter_table("trial", schema=None) as batch_op:
        batch_op.alter_column("arm", existing_type=sa.String(length=100), nullable=False)
        batch_op.alter_column("draw", existing_type=sa.Integer(), nullable=False)
        batch_op.alter_column("repeat", existing_type=sa.Integer(), nullable=False)
        batch_op.alter_column("setting", existing_type=_JSON, nullable=False)
        batch_op.create_unique_constraint(
            batch_op.f("uq_trial_study_id_arm_draw_repeat"), ["study_id", "arm", "draw", "repeat"]
        )
    op.create_table(
        "task",
        sa.Column("id", sa.String(length=48), nullable=False),
        sa.Column("study_id", sa.String(length=48), nullable=False),
        sa.Column("trial_id", sa.String(length=48), nullable=False),
        sa.Column("rung", sa.Integer(), nullable=False),
        sa.Column("start", sa.Integer(), nullable=False),
        sa.Column("status", sa.String(length=40), nullable=False),
        sa.Column("reason", sa.String(length=200), nullable=False),
        sa.Column("job_id", sa.String(length=48), nullable=True),
        sa.Column("attempt", sa.Integer(), nullable=True),
        sa.Column("limit_seconds", sa.Double(), nullable=True),
        sa.Column("seconds", sa.Double(), nullable=False),
        sa.Column("lost_seconds", sa.Double(), nullable=False),
        sa.Column("losses", sa.Integer(), nullable=False),
        sa.Column("ended_by", sa.String(length=40), nullable=True),
        sa.Column("log_loss", sa.Double(), nullable=True),
        sa.Column("drift", sa.Double(), nullable=True),
        sa.Column("metrics", _JSON, nullable=False),
        sa.Column("started_at", sa.Double(), nullable=True),
        sa.Column("finished_at", sa.Double(), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], name=op.f("fk_task_job_id_job")),
        sa.ForeignKeyConstraint(["study_id"], ["study.id"], name=op.f("fk_task_study_id_study")),
        sa.ForeignKeyConstraint(["trial_id"], ["trial.id"], name=op.f("fk_task_trial_id_trial")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_task")),
        sa.UniqueConstraint("trial_id", "rung", name=op.f("uq_task_trial_id_rung")),
    )
    op.create_index(op.f("ix_task_study_id"), "task", ["study_id"])


def downgrade() -> None:
    op.drop_index(op.f("ix_task_study_id"), table_name="task")
    op.drop_table("task")
    with op.batch_alter_table("trial", schema=None) as batch_op:
        batch_op.drop_constraint(batch_op.f("uq_trial_study_id_arm_draw_repeat"), type_="unique")
        for name in ("rung", "setting", "repeat", "draw", "arm"):
            batch_op.drop_column(name)
    with op.batch_alter_table("study", schema=None) as batch_op:
        for name in ("ended_at", "stop_reason", "stopped_by", "quotes", "shape", "plan"):
            batch_op.drop_column(name)
    with op.batch_alter_table("job", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_job_parent_id"))
        batch_op.drop_constraint(batch_op.f("fk_job_parent_id_job"), type_="foreignkey")
        batch_op.drop_column("parent_id")
