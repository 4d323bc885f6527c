"""limits of owners and keys, and who did what

Revision ID: 20261125_quotas
Revises: 20261125_webhooks
"""

revision = "20261125_quotas"
down_revision = "20261125_webhooks"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Filled by the commit that adds the tables."""


def downgrade() -> None:
    """Filled by the commit that adds the tables."""
