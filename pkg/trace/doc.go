// Package trace loads the probes, attaches them and hands out their records. It has nf_tables
// tell what it does (nftkey.go), as long as the probes are there.
//
// The probes are there twice, of the same sources: for fentry, and for kprobes on kernels that
// lack what the former need (Backend), or in modules that do. Which it is to be is found out by
// trying, never from a version (backend.go); so is whether a module is loaded or built in
// (modules.go).
//
// It may import bpf, events and filter. It knows nothing of rulesets and names:
// what it reads are addresses and indices.
package trace
