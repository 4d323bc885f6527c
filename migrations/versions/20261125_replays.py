"""answers kept for repeated requests

Revision ID: 20261125_replays
Revises: 20261124_search_tasks
"""

revision = "20261125_replays"
down_revision = "20261124_search_tasks"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Filled by the commit that adds the tables."""


def downgrade() -> None:
    """Filled by the commit that adds the tables."""
