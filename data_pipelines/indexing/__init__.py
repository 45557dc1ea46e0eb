"""From files to facts: one file probed, many in parallel, a folder's index and the file that stores it.

Nothing here knows labels, splits or formats of data sets.
"""
