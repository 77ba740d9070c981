// Package trace loads the probes, attaches them and hands out their records.
//
// It may import bpf, events and filter. It knows nothing of rulesets and names:
// what it reads are addresses and indices.
package trace
