package render

import "testing"

func BenchmarkTrace(b *testing.B) { benchmark(b, NewTrace(TraceOptions{})) }

func BenchmarkTree(b *testing.B) { benchmark(b, NewTree(TreeOptions{})) }

func BenchmarkJSON(b *testing.B) { benchmark(b, NewJSON()) }

func benchmark(b *testing.B, r Renderer) {
	j := journeys()["s3-request"]
	b.ReportAllocs()
	var buf []byte
	for b.Loop() {
		buf = r.Append(buf[:0], j)
	}
}
