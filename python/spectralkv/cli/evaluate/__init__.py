"""``spectralkv evaluate``: the studies, a module each; `spectralkv.cli.app` puts them together."""
