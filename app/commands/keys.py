"""`kdpo keys …`: API keys, straight in the database; the server need not run."""

import time
from typing import Annotated

import typer

from app.commands.connect import AsJson, DataDir
from app.commands.show import err, out, print_json, table, when
from app.keys import Scope
from core.errors import NotFound

# Where they are used, what loads the server's code is imported: help and completion need it not.
keys = typer.Typer(help="Make, list and revoke API keys.", no_args_is_help=True)

OWNER = "default"


@keys.command("create")
def create_key(
    name: Annotated[str, typer.Option("--name", help="What the key is for.")] = "cli",
    owner: Annotated[str, typer.Option("--owner", help="Whose objects it sees.")] = OWNER,
    scope: Annotated[
        list[Scope] | None, typer.Option("--scope", help="May be given again; default: all.")
    ] = None,
    expires_days: Annotated[float | None, typer.Option("--expires-days", min=0.001)] = None,
    rate: Annotated[
        int | None,
        typer.Option("--requests-per-minute", min=1, help="Default: as many as all keys."),
    ] = None,
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """Make a key and print it; it is shown only now."""
    from app import serving

    settings = serving.settings_of(data_dir=data_dir)
    expires = None if expires_days is None else time.time() + expires_days * 86400
    with serving.told_faults(), serving.open_database(settings) as database:
        made = serving.add_key(
            database, settings, name=name, owner=owner, scopes=scope or list(Scope),
            expires=expires, requests_per_minute=rate,
        )  # fmt: skip
    if as_json:
        print_json({"id": made.id, "key": made.secret, "name": name, "owner": owner})
    else:
        typer.echo(made.secret)


@keys.command("list")
def list_keys(as_json: AsJson = False, data_dir: DataDir = None) -> None:
    """List all keys by their first characters."""
    from app import serving

    found = serving.key_rows(serving.settings_of(data_dir=data_dir))
    if as_json:
        print_json([vars(row) for row in found])
        return
    rows = [
        (
            row.id, f"{row.prefix}…", row.name,
            Scope.ADMIN.value if Scope.ADMIN in row.scopes else " ".join(row.scopes),
            when(row.last_used_at), when(row.expires_at), row.state,
        )
        for row in found
    ]  # fmt: skip
    out().print(table("id", "key", "name", "scopes", "last used", "expires", "state", rows=rows))


@keys.command("revoke")
def revoke_key(key_id: str, as_json: AsJson = False, data_dir: DataDir = None) -> None:
    """Make a key useless at once."""
    from app import serving

    if not serving.revoke(serving.settings_of(data_dir=data_dir), key_id):
        raise NotFound(f"no usable key {key_id!r}", hint="`kdpo keys list` shows the ids")
    if as_json:
        print_json({"id": key_id, "state": "revoked"})
    else:
        err().print(f"kdpo: {key_id} is revoked")
