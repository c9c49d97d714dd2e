"""What came of runs, to look at: `page` is one HTML file, `markdown` the tables of the results page.

Both start from `groups`: records of the same task, network and size, which can be compared.
"""
