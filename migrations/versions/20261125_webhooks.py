"""webhooks and their deliveries; resumable uploads; kept checkpoints

Revision ID: 20261125_webhooks
Revises: 20261125_replays
"""

revision = "20261125_webhooks"
down_revision = "20261125_replays"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Filled by the commit that adds the tables."""


def downgrade() -> None:
    """Filled by the commit that adds the tables."""
