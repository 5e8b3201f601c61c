"""Lets the tests in folders below import the strategies of this one."""
