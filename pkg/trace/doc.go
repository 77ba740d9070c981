// Package trace loads the probes, attaches them and hands out their records. It has nf_tables
// tell what it does (nftkey.go), as long as the probes are there.
//
// It may import bpf, events and filter. It knows nothing of rulesets and names:
// what it reads are addresses and indices.
package trace
