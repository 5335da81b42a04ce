"""The one configuration of a training run: a module per section, and `root`, the whole.

Free of torch, so that mistakes are reported at once.

Names: a *segment* is what local attention sees, a *window* is `train.window_segments` segments and
is covered by one forward and backward, a *lane* is an endless stream of documents. One optimizer
step consumes one window from each of `data.lanes` lanes, whatever the number of ranks.
"""
