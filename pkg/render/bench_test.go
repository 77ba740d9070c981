package render

import (
	"io"
	"testing"
)

func BenchmarkTrace(b *testing.B) { benchmark(b, NewTrace(io.Discard)) }

func BenchmarkTree(b *testing.B) { benchmark(b, NewTree(io.Discard, TreeOptions{})) }

func BenchmarkJSON(b *testing.B) { benchmark(b, NewJSON(io.Discard)) }

func benchmark(b *testing.B, r Renderer) {
	j := journeys()["s3-request"]
	b.ReportAllocs()
	for b.Loop() {
		if err := r.Journey(j); err != nil {
			b.Fatal(err)
		}
	}
}
