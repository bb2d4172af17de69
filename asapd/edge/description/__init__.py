"""The API described for programs: tables of operations by subject, and the documents they make."""
