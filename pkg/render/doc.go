// Package render turns a packet's journey into text: a tree for people
// ([Tree]), the lines that the kernel's own TRACE target would have logged
// ([Trace]), and one JSON object per packet ([JSON]).
//
// The functions are pure: a journey in, bytes out, the same bytes each time.
// Each journey reaches its writer in one Write, so that the reader of a pipe
// sees whole packets. A [Renderer] adds them to a buffer instead, for many at once.
//
// Everything a journey names may have been chosen by an attacker: the packet
// itself, interface names, chain names, rule comments, container names. No
// control character of theirs, nor bytes that are not UTF-8, gets through
// (see escape.go).
//
// It may import package events and the standard library, nothing else.
package render
