"""A run's report: one HTML page that needs no network."""

from training.report.runs import write_report, write_reports

__all__ = ["write_report", "write_reports"]
