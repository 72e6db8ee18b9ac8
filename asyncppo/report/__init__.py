"""The report of a run, from its directory.

summary  reads everything into one frozen `Summary`
text     a short report for a terminal
plots    the pictures; the only importer of matplotlib
"""
