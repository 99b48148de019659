"""Keeping the catalog current: reading arXiv's query API politely and queueing what nobody has judged.

One idea a file: ``clock`` (time as a value), ``atom`` (feeds as data from a stranger), ``cache`` (pages of today, lock), ``client``
(politeness and patience), ``reader`` (one window to its end), ``queries`` (what is asked, watermarks), ``known`` (de-duplication),
``scoring`` (who judges), ``updater`` (the run), ``report`` and ``summary`` (what it says).
"""
