"""What is known of a run while it goes on and after it: where its files lie, who works there, with
what it was started, how far it came and what failed.

`folder` names every file, `lock` says who may write, `record` with what a run was started, how far
it is and what went wrong, `status` where a search or a campaign stands; every part of the package
may call them.
"""
