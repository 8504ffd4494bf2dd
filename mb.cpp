#include <immintrin.h>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <chrono>
#include <vector>
#include <algorithm>
#include <functional>
using T=float; const long N=11700000;
double now(){return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();}
float *a,*b,*c,*d;
double bench(std::function<void()> f){std::vector<double> t; f(); for(int i=0;i<15;i++){double s=now();f();t.push_back(now()-s);} std::sort(t.begin(),t.end()); return t[7]*1e3;}
volatile double sink;
void sumd(long pf){ __m256d s[4]={}; for(long i=0;i+16<=N;i+=16){ if(pf)_mm_prefetch((char*)(a+i)+pf,_MM_HINT_T0); for(int k=0;k<4;k++){__m256d v=_mm256_cvtps_pd(_mm_loadu_ps(a+i+4*k)); s[k]=_mm256_add_pd(s[k],_mm256_mul_pd(v,v));}} sink=s[0][0]+s[1][0]+s[2][1]+s[3][0];}
void sumf(long pf){ __m256 s[4]={}; for(long i=0;i+32<=N;i+=32){ if(pf){_mm_prefetch((char*)(a+i)+pf,_MM_HINT_T0);_mm_prefetch((char*)(a+i)+pf+64,_MM_HINT_T0);} for(int k=0;k<4;k++){__m256 v=_mm256_loadu_ps(a+i+8*k); s[k]=_mm256_add_ps(s[k],_mm256_mul_ps(v,v));}} sink=s[0][0]+s[1][0]+s[2][1]+s[3][0];}
// multi-stream sum: read 4 places at once
void sum4(long pf){ __m256d s[4]={}; long q=N/4/16*16; for(long i=0;i+16<=q;i+=16){ for(int j=0;j<4;j++) for(int k=0;k<4;k++){__m256d v=_mm256_cvtps_pd(_mm_loadu_ps(a+j*q+i+4*k)); s[k]=_mm256_add_pd(s[k],_mm256_mul_pd(v,v));}} sink=s[0][0]+s[1][0]+s[2][1]+s[3][0];}
void copynt(){ for(long i=0;i+8<=N;i+=8) _mm256_stream_ps(c+i,_mm256_loadu_ps(a+i)); _mm_sfence();}
void cpy(){ memcpy(c,a,N*4);}
void into_direct(long pf){ __m256 s=_mm256_set1_ps(.1f); for(long i=0;i+16<=N;i+=16){ if(pf){_mm_prefetch((char*)(a+i)+pf,_MM_HINT_T0);_mm_prefetch((char*)(b+i)+pf,_MM_HINT_T0);} for(int k=0;k<2;k++) _mm256_stream_ps(c+i+8*k,_mm256_add_ps(_mm256_loadu_ps(a+i+8*k),_mm256_mul_ps(s,_mm256_loadu_ps(b+i+8*k))));} _mm_sfence();}
void into_stage(int st){ static float buf[65536]; __m256 s=_mm256_set1_ps(.1f); for(long at=0;at<N;at+=st){ long n=std::min<long>(st,N-at)/8*8; for(long i=0;i<n;i+=8) _mm256_store_ps(buf+i,_mm256_add_ps(_mm256_loadu_ps(a+at+i),_mm256_mul_ps(s,_mm256_loadu_ps(b+at+i)))); for(long i=0;i<n;i+=4) _mm_stream_ps(c+at+i,_mm_load_ps(buf+i));} _mm_sfence();}
void into_plain(){ __m256 s=_mm256_set1_ps(.1f); for(long i=0;i+8<=N;i+=8) _mm256_store_ps(c+i,_mm256_add_ps(_mm256_loadu_ps(a+i),_mm256_mul_ps(s,_mm256_loadu_ps(b+i))));}
void into_rev(){ __m256 s=_mm256_set1_ps(.1f); const long U=32768; for(long u=(N-1)/U*U;u>=0;u-=U){long e=std::min(N,u+U); for(long i=u;i+8<=e;i+=8) _mm256_stream_ps(c+i,_mm256_add_ps(_mm256_loadu_ps(a+i),_mm256_mul_ps(s,_mm256_loadu_ps(b+i))));} _mm_sfence();}
void sgd(long pf){ __m256 s=_mm256_set1_ps(.1f),mu=_mm256_set1_ps(.9f); for(long i=0;i+8<=N;i+=8){ if(pf&&!(i&15)){_mm_prefetch((char*)(a+i)+pf,_MM_HINT_T0);_mm_prefetch((char*)(b+i)+pf,_MM_HINT_T0);_mm_prefetch((char*)(d+i)+pf,_MM_HINT_T0);} __m256 m=_mm256_add_ps(_mm256_mul_ps(mu,_mm256_loadu_ps(d+i)),_mm256_loadu_ps(b+i)); _mm256_store_ps(d+i,m); _mm256_store_ps(a+i,_mm256_sub_ps(_mm256_loadu_ps(a+i),_mm256_mul_ps(s,m)));}}
void backup_direct(){ __m256 s=_mm256_set1_ps(.1f); for(long i=0;i+8<=N;i+=8){ __m256 w=_mm256_loadu_ps(a+i); _mm256_stream_ps(c+i,w); _mm256_store_ps(a+i,_mm256_add_ps(w,_mm256_mul_ps(s,_mm256_loadu_ps(b+i))));} _mm_sfence();}
void desc_nt(){ __m256 s=_mm256_set1_ps(.1f),mu=_mm256_set1_ps(.9f); for(long i=0;i+8<=N;i+=8){ __m256 m=_mm256_add_ps(_mm256_mul_ps(mu,_mm256_loadu_ps(d+i)),_mm256_loadu_ps(b+i)); _mm256_store_ps(d+i,m); _mm256_stream_ps(a+i,_mm256_sub_ps(_mm256_loadu_ps(c+i),_mm256_mul_ps(s,m)));} _mm_sfence();}
void desc_plain(){ __m256 s=_mm256_set1_ps(.1f),mu=_mm256_set1_ps(.9f); for(long i=0;i+8<=N;i+=8){ __m256 m=_mm256_add_ps(_mm256_mul_ps(mu,_mm256_loadu_ps(d+i)),_mm256_loadu_ps(b+i)); _mm256_store_ps(d+i,m); _mm256_store_ps(a+i,_mm256_sub_ps(_mm256_loadu_ps(c+i),_mm256_mul_ps(s,m)));} }
int main(){ for(float**p:{&a,&b,&c,&d}){*p=(float*)aligned_alloc(4096,(N*4+8191)/4096*4096); for(long i=0;i<N;i++)(*p)[i]=.001f*(i%977);}
 for(int r=0;r<2;r++){
 printf("memcpy %.2f copynt %.2f\n",bench(cpy),bench(copynt));
 for(long pf:{0L,512L,1024L,2048L,4096L}) printf("pf %ld sumd %.2f sumf %.2f into %.2f sgd %.2f\n",pf,bench([=]{sumd(pf);}),bench([=]{sumf(pf);}),bench([=]{into_direct(pf);}),bench([=]{sgd(pf);}));
 printf("sum4 %.2f plain %.2f rev %.2f\n",bench([]{sum4(0);}),bench(into_plain),bench(into_rev));
 for(int st:{256,512,1024,2048,4096,8192}) printf("stage %d: %.2f\n",st,bench([=]{into_stage(st);}));
 printf("backup_direct %.2f desc_nt %.2f desc_plain %.2f\n",bench(backup_direct),bench(desc_nt),bench(desc_plain));
 }}
