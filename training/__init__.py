import app  # noqa: F401 - before OpenVINO is imported here: app keeps it from reporting its import
