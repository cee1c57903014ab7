from .sections import write_report as write_report
