// Package rulegen makes random rulesets for the legacy tables, those of arptables too, and
// for nf_tables from a seed: the same seed gives the same rules on every machine and with
// every Go release.
//
// The rules are there to give packets long and odd paths: user chains entered
// by jump and by goto, twice from one chain, returns from user and from base
// chains, targets that change the packet or send another one. They always load:
// targets and matches are used only in the tables and hooks that take them, and
// jumps lead from a chain to a later one only, so there is no loop.
//
// No rule writes to the kernel's log, which belongs to the oracle.
package rulegen
