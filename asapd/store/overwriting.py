"""What is deleted is overwritten in the file: what was erased is in no page of it, nor in any later copy."""

from __future__ import annotations

import apsw


def overwrite_what_goes(connection: apsw.Connection) -> None:
    """Have this connection write zeros over all that it deletes or replaces.

    SQLite else leaves it in the unused parts of pages, for good where no new row comes. Its `fast` mode is not enough:
    it leaves what a page held that is freed whole, such as that of a long text, also when a part of it is used again.
    """
    connection.pragma("secure_delete", True)
