"""The one exception whose message is written for users: what is wrong, where, and what to do."""


class EmsslError(Exception):
    """A failure that the user can mend; the command line prints its message alone and exits with 1."""
