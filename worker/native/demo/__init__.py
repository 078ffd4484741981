"""The demo model: how `headgate-demo` is made. Nothing here is needed to serve it."""
