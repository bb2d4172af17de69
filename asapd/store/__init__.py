"""SQLite: the only room that imports apsw. Units of work go in as values, results come out as values."""
