"""tasks of searches, and jobs with a parent

Revision ID: 20261124_search_tasks
Revises: 20261124_dataset_sources
"""

revision = "20261124_search_tasks"
down_revision = "20261124_dataset_sources"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Filled by the commit that adds the tables."""


def downgrade() -> None:
    """Filled by the commit that adds the tables."""
