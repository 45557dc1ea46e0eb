"""The one exception for mistakes of the user, as opposed to mistakes of ours."""


class UserError(Exception):
    """Something the user can mend. The message is one line: what is wrong, the value, what to do.

    Scripts print it without a traceback and exit with code 2.
    """
