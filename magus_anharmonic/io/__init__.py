"""Everything that is read from files and written to them: JSON, JSON lines, tables, arrays.

`digests` names content, `files` writes atomically and reads what was written, `tables` has CSV
files whose rows are dataclasses, `pictures` the one look of all figures. Nobody else imports
``csv`` or ``json`` or loads arrays; every part of the package may call them.
"""
