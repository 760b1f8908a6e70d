"""The keys on which the HTTP process and the scheduler process agree. Nothing else is shared between them but the core."""

from __future__ import annotations

# Of `sampling_params.custom_params`, from the HTTP process to the scheduler.
CUSTOM_KEY = "ets"  # the settings of a search, as JSON text (or, on /generate, as an object)
QUESTION_KEY = "ets_question"  # what the PRM is asked about, where that is not the whole prompt
TRACE_PARAM = "ets_trace"  # the HTTP process wants the tree while it grows

# Of `meta_info`, from the scheduler to the HTTP process.
RESULT_KEY = "search"  # a list of reports; the last one of an answered search is its result
# Of a report.
PROGRESS_KEY = "progress"
TRACE_KEY = "trace"

# The status of a search that was aborted, of which HTTP has none: nobody is to send it again, as clients do with 5xx.
ABORTED_STATUS = 499

# The id of an abort that ends all searches and no other request: the server has been asked to stop.
STOP_ID = "\x00ets-stop"
